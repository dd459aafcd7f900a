"""What runs inside the sandbox: standard library only, and as little of it as will do.

The modules are imported there as files of one folder, not as parts of this package.
"""
