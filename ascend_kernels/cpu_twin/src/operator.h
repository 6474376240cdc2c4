// Calls an operator as the framework does: definition, inference, tiling, kernel.
#pragma once

#include "launch.h"
#include "twin_host/op_def.h"

namespace twin {

// A tensor of the caller. An optional input that is absent has no data.
struct Tensor {
    void* data = nullptr;
    gert::Shape shape;
    ge::DataType type = ge::DT_UNDEFINED;
};

struct Machine {
    uint32_t cores = 8;
    uint64_t ub_bytes = 196608;  // 192 KB; CANN keeps the last 8 KB for temporaries
};

constexpr uint64_t kReservedUb = 8192;

// Thrown where the caller is at fault, not the kernel.
struct BadRequest : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Operator {
public:
    // Throws BadRequest when nobody defines the type.
    explicit Operator(const std::string& type);

    const ops::OpDef& definition() const { return definition_; }

    // `values` by the definition's order; what is missing takes its default.
    gert::RuntimeAttrs attrs(const std::map<std::string, double>& values) const;

    // Shapes and types of the outputs, as the operator's inference functions say.
    std::vector<Tensor> infer(const std::vector<Tensor>& inputs,
                              const gert::RuntimeAttrs& attrs) const;

    // Runs the tiling function on the outputs of infer().
    gert::TilingContext tile(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
                             const gert::RuntimeAttrs& attrs, const Machine& machine) const;

    // Runs everything; the outputs' data are the caller's. Returns the counters of each block.
    std::vector<Counters> run(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
                              const gert::RuntimeAttrs& attrs, const Machine& machine) const;

private:
    void check_types(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const;
    void fill(gert::TwinContext& context, const std::vector<Tensor>& inputs,
              const gert::RuntimeAttrs& attrs) const;

    const ops::OpDef& definition_;
};

}  // namespace twin
