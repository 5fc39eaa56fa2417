from .accuracy import predict as predict
from .backends import (
    BACKENDS as BACKENDS,
    BackendModel as BackendModel,
    Call as Call,
    make_call as make_call,
    onnx_call as onnx_call,
    onnx_file as onnx_file,
    openvino_call as openvino_call,
    openvino_model as openvino_model,
    prepare_checked as prepare_checked,
    require_backend as require_backend,
    unsupported_reason as unsupported_reason,
)
from .cost import (
    Measurement as Measurement,
    count_macs as count_macs,
    count_params as count_params,
    model_row_fields as model_row_fields,
)
from .measures import Measures as Measures
from .measuring import measure as measure
from .timing import (
    compare_latency as compare_latency,
    latency_metrics as latency_metrics,
    latency_values as latency_values,
    shared_rounds as shared_rounds,
)
from .token_scaling import measure_token_scaling as measure_token_scaling
