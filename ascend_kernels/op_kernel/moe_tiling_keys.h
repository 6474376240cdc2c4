// Names of the tiling keys: what the host's tiling chose, and what the kernels switch on.
//
// Macros, not constants: CANN's build reads the keys from the preprocessed kernel source.
#ifndef MOE_TILING_KEYS_H
#define MOE_TILING_KEYS_H

// Gating and its gradient. EIGHT: eight experts, a row of float32 is one 32-byte block.
// WIDE: any number of experts, rows padded to whole vector repeats.
#define MOE_GATING_EIGHT_FLOAT 11
#define MOE_GATING_EIGHT_HALF 12
#define MOE_GATING_EIGHT_BFLOAT16 13
#define MOE_GATING_WIDE_FLOAT 21
#define MOE_GATING_WIDE_HALF 22
#define MOE_GATING_WIDE_BFLOAT16 23

// Capacity. ONE_QUEUE: places are given token by token.
// QUEUE_PER_CHOICE: all first choices before any second one.
#define MOE_CAPACITY_ONE_QUEUE 1
#define MOE_CAPACITY_QUEUE_PER_CHOICE 2

// Dispatch. BY_PLACE: slot_src alone. BY_TOKEN: with expanded_row_idx.
// WHOLE_ROWS: a row fits a buffer. SPLIT_ROWS: a row is moved in pieces.
#define MOE_DISPATCH_BY_PLACE_WHOLE_ROWS 11
#define MOE_DISPATCH_BY_PLACE_SPLIT_ROWS 12
#define MOE_DISPATCH_BY_TOKEN 21

// Permute. TABLES: no rows are given. ROWS: they are moved as well.
#define MOE_PERMUTE_TABLES 1
#define MOE_PERMUTE_ROWS 2

// Combine, the gradients of dispatch and combine, SwiGLU and its gradient: the dtype of the rows.
#define MOE_ROWS_FLOAT 1
#define MOE_ROWS_HALF 2
#define MOE_ROWS_BFLOAT16 3

#endif  // MOE_TILING_KEYS_H
