"""A pretrained model keeps its function and gives up its cache: fitting, and what it is measured by."""
