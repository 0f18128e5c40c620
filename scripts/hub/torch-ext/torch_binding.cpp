// Makes the shared library importable; csrc/ops/schema.cpp defines the operators.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
