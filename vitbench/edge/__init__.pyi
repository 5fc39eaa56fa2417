from .bundle import (
    adopt as adopt,
    make_bundle as make_bundle,
)
from .figures import (
    claims as claims,
    cliff as cliff,
    fits as fits,
    stacks as stacks,
    streams as streams,
)
from .model import (
    Setting as Setting,
    cost as cost,
    load_profiles as load_profiles,
)
from .rows import (
    backend_table as backend_table,
    modelled as modelled,
    streamed as streamed,
    works as works,
)
