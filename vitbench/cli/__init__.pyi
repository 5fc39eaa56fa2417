from .common import (
    add_images as add_images,
    data_of as data_of,
    print_results as print_results,
)
from .program import main as main
