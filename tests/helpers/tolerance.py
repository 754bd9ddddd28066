"""Every tolerance of the test suite, with its reason."""

# float32 against another float32 implementation: a few ulps through six layers of activations of order one.
FP32_HIDDEN_ATOL = 1e-4
FP32_LOGITS_ATOL = 1e-4
# One operation in float32 against the same mathematics in another order.
FP32_OP_ATOL = 2e-5
# Per-layer cosine asked of any implementation, teacher-forced (the bring-up plan's gate).
LAYER_COSINE = 0.999
# One real-width layer in bfloat16 against float32 arithmetic on the same bfloat16 weights and inputs: 8 bits of
# mantissa and sums of 7,168 terms.
BF16_LAYER_COSINE = 0.999
