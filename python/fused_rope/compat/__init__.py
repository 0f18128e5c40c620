"""Drop-ins for the rotary functions of other libraries, one module for each library.

They have the originals' names, argument order and shapes. They compute nothing: they rename
arguments, reshape views and call `fused_rope`.
"""
