from .budgets import budget_table as budget_table
from .comparison_table import (
    across_seeds as across_seeds,
    comparison as comparison,
    findings as findings,
    label_of as label_of,
    percent as percent,
    points as points,
    ratios as ratios,
    running_table as running_table,
    subject as subject,
    value as value,
)
from .records import (
    Row as Row,
    append_rows as append_rows,
    read_rows as read_rows,
    split_check as split_check,
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
    quiet_ratio as quiet_ratio,
    wilson as wilson,
)
