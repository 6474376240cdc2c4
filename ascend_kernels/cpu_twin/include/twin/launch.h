// What CANN's build adds around a kernel: the tiling data, the tiling key, the workspace, and the
// table of all kernels in the library.
#pragma once

#include <cstring>
#include <string>
#include <utility>

#include "twin/tensor.h"

namespace twin {

// In front of a kernel's own workspace the framework keeps some for its libraries.
constexpr size_t kLibraryWorkspace = 1024;

// A compiled kernel: its entry point takes `arguments` addresses; `call` knows its type.
struct Kernel {
    size_t arguments;
    size_t tiling_bytes;
    void (*entry)();
    void (*call)(void (*entry)(), GM_ADDR const* arguments);
};

// Enters a kernel into the table of the library, by the name of its entry point.
void add_kernel(const char* name, const Kernel& kernel);

// The kernel of that name, or null.
const Kernel* find_kernel(const std::string& name);

template <typename Address, size_t>
using Repeated = Address;

template <size_t... Index>
void call_kernel(void (*entry)(), GM_ADDR const* arguments)
{
    using Entry = void (*)(Repeated<GM_ADDR, Index>...);
    reinterpret_cast<Entry>(entry)(arguments[Index]...);
}

struct RegisterKernel {
    template <typename... Addresses>
    RegisterKernel(const char* name, void (*entry)(Addresses...), size_t tiling_bytes)
    {
        static_assert((std::is_same_v<Addresses, GM_ADDR> && ...), "a kernel takes addresses only");
        enter(name, reinterpret_cast<void (*)()>(entry), tiling_bytes,
              std::index_sequence_for<Addresses...>());
    }

private:
    template <size_t... Index>
    static void enter(const char* name, void (*entry)(), size_t tiling_bytes,
                      std::index_sequence<Index...>)
    {
        add_kernel(name, {sizeof...(Index), tiling_bytes, entry, &call_kernel<Index...>});
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

#define TILING_KEY_IS(key) (twin::core().tiling_key == (key))

enum KernelMetaType { KERNEL_TYPE_AIV_ONLY, KERNEL_TYPE_MIX_AIV_1_0 };
#define KERNEL_TASK_TYPE_DEFAULT(type) (twin::core().aiv_only = (type) == KERNEL_TYPE_AIV_ONLY)
#define KERNEL_TASK_TYPE(key, type) static_assert((type) >= 0, "a kernel type")
