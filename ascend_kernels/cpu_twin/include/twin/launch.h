// What CANN's build adds around a kernel: the tiling data, the tiling key, the workspace, and the
// table of all kernels in the library.
#pragma once

#include <map>
#include <utility>

#include "twin/grid.h"
#include "twin/tensor.h"

namespace twin {

// In front of a kernel's own workspace the framework keeps some for its libraries.
constexpr size_t kLibraryWorkspace = 1024;

// A compiled kernel: its entry point takes `arguments` addresses.
struct Kernel {
    size_t arguments;
    size_t tiling_bytes;
    std::function<void(GM_ADDR const*)> call;
};

// By entry-point name. In a function: the kernels register before main and in any order.
inline std::map<std::string, Kernel>& kernels()
{
    static std::map<std::string, Kernel> table;
    return table;
}

template <typename... Addresses, size_t... Index>
Kernel make_kernel(void (*entry)(Addresses...), size_t tiling_bytes, std::index_sequence<Index...>)
{
    static_assert((std::is_same_v<Addresses, GM_ADDR> && ...), "a kernel takes addresses only");
    return {sizeof...(Addresses), tiling_bytes,
            [entry](GM_ADDR const* arguments) { entry(arguments[Index]...); }};
}

struct RegisterKernel {
    template <typename... Addresses>
    RegisterKernel(const char* name, void (*entry)(Addresses...), size_t tiling_bytes)
    {
        kernels()[name] = make_kernel(entry, tiling_bytes, std::index_sequence_for<Addresses...>());
    }
};

template <typename Tiling>
void load_tiling(Tiling& tiling, const uint8_t* address)
{
    std::memcpy(&tiling, address, sizeof(Tiling));
}

}  // namespace twin

namespace AscendC {

inline GM_ADDR GetUserWorkspace(GM_ADDR workspace)
{
    return workspace ? workspace + twin::kLibraryWorkspace : nullptr;
}

}  // namespace AscendC

// TwinTilingData is what REGISTER_TILING_DATA_CLASS named in the operator's tiling header.
#define GET_TILING_DATA(name, address) \
    TwinTilingData name;               \
    twin::load_tiling(name, address)

#define GET_TILING_DATA_WITH_STRUCT(type, name, address) \
    type name;                                           \
    twin::load_tiling(name, address)

#define TILING_KEY_IS(key) (twin::core().grid->tiling_key == (key))

enum KernelMetaType { KERNEL_TYPE_AIV_ONLY, KERNEL_TYPE_MIX_AIV_1_0 };
#define KERNEL_TASK_TYPE_DEFAULT(type) (twin::core().aiv_only = (type) == KERNEL_TYPE_AIV_ONLY)
#define KERNEL_TASK_TYPE(key, type) static_assert((type) >= 0, "a kernel type")
