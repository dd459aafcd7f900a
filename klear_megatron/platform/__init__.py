"""Where this process runs. The only package that knows a CPU from a GPU."""
