#include "operator.h"

#include <cctype>
#include <sstream>

namespace twin {
namespace {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts)
{
    std::ostringstream text;
    (text << ... << parts);
    throw BadRequest(text.str());
}

// The entry point of an OpType, by CANN's rule: MoeGatingTopKGrad -> moe_gating_top_k_grad.
std::string entry_point(const std::string& type)
{
    std::string name;
    for (size_t i = 0; i < type.size(); ++i) {
        const bool upper = std::isupper(type[i]);
        const bool after_lower = i > 0 && !std::isupper(type[i - 1]);
        const bool before_lower = i > 0 && i + 1 < type.size() && std::islower(type[i + 1]);
        if (upper && (after_lower || before_lower)) {
            name += '_';
        }
        name += static_cast<char>(std::tolower(type[i]));
    }
    return name;
}

const ops::OpDef& find(const std::string& type)
{
    const auto found = operators().find(type);
    if (found == operators().end()) {
        refuse("no operator ", type, " in this library");
    }
    return *found->second;
}

size_t bytes_of(const Tensor& tensor)
{
    return tensor.shape.GetShapeSize() * ge::GetSizeByDataType(tensor.type);
}

}  // namespace

Operator::Operator(const std::string& type) : definition_(find(type)) {}

gert::RuntimeAttrs Operator::attrs(const std::map<std::string, double>& values) const
{
    gert::RuntimeAttrs result;
    size_t used = 0;
    for (const auto& attr : definition_.attrs) {
        gert::RuntimeAttrs::Value value = attr->default_value;
        const auto given = values.find(attr->name);
        if (given != values.end()) {
            ++used;
            value.integer = static_cast<int64_t>(given->second);
            value.real = static_cast<float>(given->second);
            value.boolean = given->second != 0;
        } else if (attr->option == ops::REQUIRED) {
            refuse(definition_.type, ": attribute ", attr->name, " is required");
        }
        result.values.push_back(value);
    }
    if (used != values.size()) {
        refuse(definition_.type, ": an attribute that the operator does not have");
    }
    return result;
}

void Operator::fill(gert::TwinContext& context, const std::vector<Tensor>& inputs,
                    const gert::RuntimeAttrs& attrs) const
{
    if (inputs.size() != definition_.inputs.size()) {
        refuse(definition_.type, ": ", inputs.size(), " inputs given, ", definition_.inputs.size(),
               " defined");
    }
    context.node_name = definition_.type;
    context.attrs = attrs;
    for (size_t i = 0; i < inputs.size(); ++i) {
        const bool present = inputs[i].data != nullptr;
        if (!present && definition_.inputs[i]->option == ops::REQUIRED) {
            refuse(definition_.type, ": input ", definition_.inputs[i]->name, " is required");
        }
        if (present) {
            context.inputs.push_back(
                gert::TwinInput{gert::StorageShape(inputs[i].shape),
                                gert::CompileTimeTensorDesc(inputs[i].type)});
        } else {
            context.inputs.emplace_back();
        }
    }
}

// One column of the type lists must hold for all tensors at once.
void Operator::check_types(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const
{
    const size_t columns = definition_.inputs[0]->types.size();
    const auto lists_agree = [&](const auto& parameters) {
        for (const auto& parameter : parameters) {
            if (parameter->types.size() != columns || parameter->formats.size() != columns ||
                parameter->unknown_formats.size() != columns) {
                refuse(definition_.type, ": the lists of types and formats of ", parameter->name,
                       " do not have ", columns, " entries as those of the first input");
            }
        }
    };
    lists_agree(definition_.inputs);
    lists_agree(definition_.outputs);
    for (size_t column = 0; column < columns; ++column) {
        bool fits = true;
        for (size_t i = 0; i < inputs.size(); ++i) {
            fits = fits && (!inputs[i].data || definition_.inputs[i]->types[column] == inputs[i].type);
        }
        for (size_t i = 0; i < outputs.size(); ++i) {
            fits = fits && definition_.outputs[i]->types[column] == outputs[i].type;
        }
        if (fits) {
            return;
        }
    }
    refuse(definition_.type, ": this combination of data types is not in the definition");
}

std::vector<Tensor> Operator::infer(const std::vector<Tensor>& inputs,
                                    const gert::RuntimeAttrs& attrs) const
{
    const size_t count = definition_.outputs.size();
    gert::InferShapeContext shapes;
    fill(shapes, inputs, attrs);
    shapes.outputs.resize(count);
    if (!definition_.infer_shape || definition_.infer_shape(&shapes) != ge::GRAPH_SUCCESS) {
        refuse(definition_.type, ": shape inference refuses these inputs");
    }
    gert::InferDataTypeContext types;
    fill(types, inputs, attrs);
    types.outputs.assign(count, ge::DT_UNDEFINED);
    if (!definition_.infer_data_type || definition_.infer_data_type(&types) != ge::GRAPH_SUCCESS) {
        refuse(definition_.type, ": type inference refuses these inputs");
    }
    std::vector<Tensor> outputs(count);
    for (size_t i = 0; i < count; ++i) {
        outputs[i].shape = shapes.outputs[i];
        outputs[i].type = types.outputs[i];
    }
    check_types(inputs, outputs);
    return outputs;
}

gert::TilingContext Operator::tile(const std::vector<Tensor>& inputs,
                                   const std::vector<Tensor>& outputs,
                                   const gert::RuntimeAttrs& attrs, const Machine& machine) const
{
    gert::TilingContext context;
    fill(context, inputs, attrs);
    for (const Tensor& output : outputs) {
        context.output_shapes.emplace_back(output.shape);
        context.output_descriptions.emplace_back(output.type);
    }
    context.platform.vector_cores = machine.cores;
    context.platform.ub_bytes = machine.ub_bytes;
    if (!definition_.core.tiling || definition_.core.tiling(&context) != ge::GRAPH_SUCCESS) {
        refuse(definition_.type, ": the tiling function refuses these inputs");
    }
    if (context.block_dim < 1 || context.block_dim > machine.cores) {
        refuse(definition_.type, ": tiling asks for ", context.block_dim, " blocks on ",
               machine.cores, " cores");
    }
    return context;
}

std::vector<Counters> Operator::run(const std::vector<Tensor>& inputs,
                                    const std::vector<Tensor>& outputs,
                                    const gert::RuntimeAttrs& attrs, const Machine& machine) const
{
    const std::vector<Tensor> expected = infer(inputs, attrs);
    if (outputs.size() != expected.size()) {
        refuse(definition_.type, ": ", outputs.size(), " outputs given, ", expected.size(), " defined");
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
        if (outputs[i].shape != expected[i].shape || outputs[i].type != expected[i].type) {
            refuse(definition_.type, ": output ", definition_.outputs[i]->name,
                   " has not the shape and type that inference says");
        }
    }
    gert::TilingContext tiling = tile(inputs, outputs, attrs, machine);

    Launch launch;
    launch.kernel = entry_point(definition_.type);
    launch.tiling_key = tiling.key;
    launch.blocks = static_cast<int>(tiling.block_dim);
    launch.ub_bytes = machine.ub_bytes - kReservedUb;
    launch.workspace_bytes = tiling.workspaces.empty() ? 0 : tiling.workspaces[0];
    const auto* data = static_cast<const uint8_t*>(tiling.data.GetData());
    launch.tiling.assign(data, data + tiling.data.GetDataSize());
    const auto add = [&](const Tensor& tensor, const std::string& name, Region::Role role) {
        if (tensor.data) {
            launch.memory.add(name, role, tensor.data, bytes_of(tensor));
        }
        launch.arguments.push_back(static_cast<uint8_t*>(tensor.data));
    };
    for (size_t i = 0; i < inputs.size(); ++i) {
        add(inputs[i], definition_.inputs[i]->name, Region::Role::input);
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
        add(outputs[i], definition_.outputs[i]->name, Region::Role::output);
    }
    std::vector<Counters> counters = twin::run(launch);
    if (counters[0].sync_alls && tiling.schedule_mode != 1) {
        fail(launch.kernel, ": calls SyncAll, but its tiling does not SetScheduleMode(1): blocks that "
                            "do not start together would hang");
    }
    return counters;
}

}  // namespace twin
