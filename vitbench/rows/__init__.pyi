from .budgets import budget_table as budget_table
from .comparison_table import (
    comparison as comparison,
    experiment_rows as experiment_rows,
    find_row as find_row,
    label_of as label_of,
    paired_top1 as paired_top1,
    progress_table as progress_table,
    ratios as ratios,
    summary_sentences as summary_sentences,
    top1_difference_text as top1_difference_text,
    top1_text as top1_text,
)
from .experiment import (
    Experiment as Experiment,
    across_seeds as across_seeds,
)
from .records import (
    Row as Row,
    append_rows as append_rows,
    read_rows as read_rows,
    split_checksum as split_checksum,
)
from .row_table import load_records as load_records
from .runs import (
    Run as Run,
    commit as commit,
    cpu_name as cpu_name,
    device_name as device_name,
)
from .statistics import (
    mean_interval as mean_interval,
    pack_hits as pack_hits,
    quiet_latency_ratio as quiet_latency_ratio,
    unpack_hits as unpack_hits,
    wilson as wilson,
)
from .verdicts import (
    accuracy_verdict as accuracy_verdict,
    best_verdict as best_verdict,
    cost_verdict as cost_verdict,
    time_verdict as time_verdict,
)
from .words import (
    display_labels as display_labels,
    method_name as method_name,
)
