from .backends import (
    BACKENDS as BACKENDS,
    Call as Call,
    Prepared as Prepared,
    available as available,
    checked as checked,
    make_call as make_call,
    onnx_call as onnx_call,
    onnx_file as onnx_file,
    openvino_call as openvino_call,
    openvino_model as openvino_model,
    unsupported_reason as unsupported_reason,
)
from .cost import (
    Value as Value,
    about as about,
    count_macs as count_macs,
    count_params as count_params,
)
from .measures import Measures as Measures
from .measuring import measure as measure
from .timing import (
    race as race,
    shared_rounds as shared_rounds,
    slots as slots,
    values as values,
)
from .token_scaling import scaling as scaling
