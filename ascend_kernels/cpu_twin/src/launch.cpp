#include "launch.h"

#include <algorithm>
#include <map>

#include "twin/grid.h"

namespace twin {

// In a function: the kernels register before main and in any order.
static std::map<std::string, Kernel>& kernels()
{
    static std::map<std::string, Kernel> table;
    return table;
}

void add_kernel(const char* name, const Kernel& kernel) { kernels()[name] = kernel; }

const Kernel* find_kernel(const std::string& name)
{
    const auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

std::vector<Counters> run(Launch& launch)
{
    const Kernel* found = find_kernel(launch.kernel);
    if (!found) {
        fail("no kernel ", launch.kernel, " in this library");
    }
    const Kernel& kernel = *found;
    if (launch.tiling.size() != kernel.tiling_bytes) {
        fail(launch.kernel, ": the tiling function wrote ", launch.tiling.size(),
             " bytes, the kernel reads ", kernel.tiling_bytes);
    }
    // DMA addresses need no alignment, but fresh memory makes a missing write visible
    std::vector<uint8_t> workspace(launch.workspace_bytes, 0xCD);
    std::vector<GM_ADDR> arguments = launch.arguments;
    arguments.push_back(workspace.empty() ? nullptr : workspace.data());
    arguments.push_back(launch.tiling.data());
    if (arguments.size() != kernel.arguments) {
        fail(launch.kernel, ": takes ", kernel.arguments, " addresses, the operator has ",
             arguments.size(), " with workspace and tiling");
    }
    if (workspace.size() > kLibraryWorkspace) {
        launch.memory.add("workspace", Region::Role::workspace, workspace.data() + kLibraryWorkspace,
                          workspace.size() - kLibraryWorkspace);
    }
    for (const Region& region : launch.memory.regions) {
        if (region.role == Region::Role::output) {
            std::fill_n(region.begin, region.size, 0xCD);
        }
    }
    Grid grid(launch.memory, launch.blocks, launch.ub_bytes, launch.tiling_key);
    try {
        grid.run([&] { kernel.call(kernel.entry, arguments.data()); });
    } catch (const Violation& violation) {
        fail(launch.kernel, ": ", violation.what());
    }
    return grid.counters();
}

}  // namespace twin
