#include "launch.h"

namespace twin {

std::vector<Counters> run(Launch& launch)
{
    const auto found = kernels().find(launch.kernel);
    if (found == kernels().end()) {
        fail("no kernel ", launch.kernel, " in this library");
    }
    const Kernel& kernel = found->second;
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
        grid.run([&] { kernel.call(arguments.data()); });
    } catch (const Violation& violation) {
        fail(launch.kernel, ": ", violation.what());
    }
    return grid.counters();
}

}  // namespace twin
