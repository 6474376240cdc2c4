// The library's C interface, for ctypes and for MindSpore.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// A tensor; data is null for an absent optional input. Types are named as MindSpore names them.
struct TwinTensor {
    void* data;
    const char* type;
    int32_t dims;
    int64_t shape[8];
};

// 0: done. 1: the request is wrong. 2: the kernel broke a rule. The message says which.
enum TwinStatus { TWIN_DONE = 0, TWIN_BAD_REQUEST = 1, TWIN_VIOLATION = 2 };

// Attributes travel as "name=number,name=number". Counters are filled with the order of
// twin::Counters, one row per block; `blocks` returns how many blocks ran.
int twin_run(const char* type, const TwinTensor* inputs, int input_count, const TwinTensor* outputs,
             int output_count, const char* attrs, uint32_t cores, uint64_t ub_bytes,
             uint64_t* counters, int32_t* blocks, char* message, size_t message_size);

// Fills shape and type of the outputs.
int twin_infer(const char* type, const TwinTensor* inputs, int input_count, const char* attrs,
               TwinTensor* outputs, int* output_count, char* message, size_t message_size);

// Writes the tiling as lines "name=value": block_dim, key, schedule_mode, workspace, then the fields.
int twin_tile(const char* type, const TwinTensor* inputs, int input_count, const char* attrs,
              uint32_t cores, uint64_t ub_bytes, char* text, size_t text_size, char* message,
              size_t message_size);

// Writes the definition as lines: "input name option types", "output ...", "attr name option kind".
int twin_describe(const char* type, char* text, size_t text_size, char* message, size_t message_size);

// Runs a kernel without an operator around it: roles are 'i', 'o' or 'w' per buffer.
int twin_launch(const char* kernel, int buffers, void* const* data, const uint64_t* sizes,
                const char* roles, const void* tiling, uint64_t tiling_size, uint64_t tiling_key,
                uint32_t blocks, uint64_t ub_bytes, uint64_t* counters, char* message,
                size_t message_size);

// How many counters there are.
int twin_counter_count(void);
}
