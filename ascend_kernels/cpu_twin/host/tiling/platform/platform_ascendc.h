// Stand-in for CANN's header: the machine as a tiling function sees it.
#pragma once

#include "twin_host/context.h"

namespace platform_ascendc {

enum class CoreMemType { L0_A = 0, L0_B, L0_C, L1, L2, UB, HBM };
enum class SocVersion { ASCEND910B = 1 };

class PlatformAscendC {
public:
    explicit PlatformAscendC(fe::PlatFormInfos* info) : info_(info) {}

    uint32_t GetCoreNum() const { return info_->vector_cores; }
    uint32_t GetCoreNumAiv() const { return info_->vector_cores; }
    // Only UB: the vector operators here use no other memory of a core.
    void GetCoreMemSize(const CoreMemType& type, uint64_t& size) const
    {
        size = type == CoreMemType::UB ? info_->ub_bytes : 0;
    }
    uint32_t GetLibApiWorkSpaceSize() const { return 1024; }  // as twin::kLibraryWorkspace
    SocVersion GetSocVersion() const { return SocVersion::ASCEND910B; }

private:
    fe::PlatFormInfos* info_;
};

}  // namespace platform_ascendc
