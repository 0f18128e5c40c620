// The namespace of the operators, which the builder makes unique.
#pragma once

#include <torch/library.h>

#define FUSED_ROPE_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#define FUSED_ROPE_LIBRARY_IMPL(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)
#define FUSED_ROPE_TEXT_(name) #name
#define FUSED_ROPE_TEXT(name) FUSED_ROPE_TEXT_(name)
#define FUSED_ROPE_OPERATOR(name) FUSED_ROPE_TEXT(TORCH_EXTENSION_NAME) "::" name
