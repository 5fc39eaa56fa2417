from .configs import (
    Config as Config,
    digest as digest,
)
from .errors import (
    InputError as InputError,
    one_of as one_of,
)
from .files import (
    TEMPORARY_NAME as TEMPORARY_NAME,
    write_bytes as write_bytes,
    write_text as write_text,
)
from .paths import (
    checkout as checkout,
    home as home,
    writable_folder as writable_folder,
)
from .progress import progress_bar as progress_bar
from .standalone import (
    thread_environment as thread_environment,
    time_alternating as time_alternating,
)
