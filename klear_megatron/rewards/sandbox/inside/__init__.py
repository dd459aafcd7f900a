"""What runs inside the sandbox. It imports as little as possible, from the standard library only.

The modules are imported there as files of one folder, not as parts of this package.
"""
