from .common import (
    add_images as add_images,
    load_option_data as load_option_data,
    print_results as print_results,
)
from .program import main as main
