"""Drop-ins for the rotary functions of other libraries, one module for each library.

They follow the original's names, argument order and shapes; none computes: each renames, reshapes
views and calls `fused_rope`.
"""
