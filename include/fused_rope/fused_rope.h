// fused-rope for libtorch: #include this, link FusedRope::fused_rope.
#pragma once

#include "fused_rope/frequencies.h"
#include "fused_rope/ops.h"
#include "fused_rope/rotary_embedding.h"
#include "fused_rope/version.h"
