#include "c_abi.h"

#include <sstream>

#include "data_types.h"
#include "operator.h"
#include "register/tilingdata_base.h"

namespace {

using twin::Counters;
using twin::Operator;
using twin::Tensor;

constexpr size_t kCounterCount = sizeof(Counters) / sizeof(uint64_t);

// Runs `body` and turns what it throws into a status and a message.
template <typename Body>
int guarded(char* message, size_t size, const Body& body)
{
    const auto report = [&](const char* text) { std::snprintf(message, size, "%s", text); };
    try {
        body();
        return TWIN_DONE;
    } catch (const twin::Violation& violation) {
        report(violation.what());
        return TWIN_VIOLATION;
    } catch (const std::exception& error) {
        report(error.what());
        return TWIN_BAD_REQUEST;
    }
}

std::vector<Tensor> tensors(const TwinTensor* from, int count)
{
    std::vector<Tensor> result(count);
    for (int i = 0; i < count; ++i) {
        result[i].data = from[i].data;
        if (!from[i].data) {
            continue;
        }
        for (int d = 0; d < from[i].dims; ++d) {
            result[i].shape.AppendDim(from[i].shape[d]);
        }
        result[i].type = twin::type_of(from[i].type);
    }
    return result;
}

std::map<std::string, double> parse_attrs(const std::string& text)
{
    std::map<std::string, double> values;
    std::istringstream stream(text);
    std::string item;
    while (std::getline(stream, item, ',')) {
        const size_t equals = item.find('=');
        values[item.substr(0, equals)] = std::stod(item.substr(equals + 1));
    }
    return values;
}

void write_counters(const std::vector<Counters>& from, uint64_t* to)
{
    if (!from.empty()) {
        std::memcpy(to, from.data(), from.size() * sizeof(Counters));
    }
}

void write_text(const std::string& text, char* to, size_t size)
{
    if (text.size() >= size) {
        throw twin::BadRequest("the buffer for the text is too small");
    }
    std::memcpy(to, text.c_str(), text.size() + 1);
}

// The value of a tiling field as text; every field is an unsigned integer, a float or a bool.
std::string field_value(const twin::TilingField& field, const uint8_t* data)
{
    std::ostringstream text;
    const auto write = [&](auto example) {
        for (size_t i = 0; i < field.count; ++i) {
            decltype(example) value;
            std::memcpy(&value, data + field.offset + i * sizeof(value), sizeof(value));
            text << (i ? " " : "") << value;
        }
    };
    if (field.type == "uint32_t") {
        write(uint32_t());
    } else if (field.type == "int32_t") {
        write(int32_t());
    } else if (field.type == "uint64_t") {
        write(uint64_t());
    } else if (field.type == "int64_t") {
        write(int64_t());
    } else if (field.type == "float") {
        write(float());
    } else {
        text << "?";
    }
    return text.str();
}

}  // namespace

extern "C" {

int twin_run(const char* type, const TwinTensor* inputs, int input_count, const TwinTensor* outputs,
             int output_count, const char* attrs, uint32_t cores, uint64_t ub_bytes,
             uint64_t* counters, int32_t* blocks, char* message, size_t message_size)
{
    return guarded(message, message_size, [&] {
        const Operator op(type);
        const auto result = op.run(tensors(inputs, input_count), tensors(outputs, output_count),
                                   op.attrs(parse_attrs(attrs)), {cores, ub_bytes});
        write_counters(result, counters);
        *blocks = static_cast<int32_t>(result.size());
    });
}

int twin_infer(const char* type, const TwinTensor* inputs, int input_count, const char* attrs,
               TwinTensor* outputs, int* output_count, char* message, size_t message_size)
{
    return guarded(message, message_size, [&] {
        const Operator op(type);
        const auto found = op.infer(tensors(inputs, input_count), op.attrs(parse_attrs(attrs)));
        if (static_cast<int>(found.size()) > *output_count) {
            throw twin::BadRequest("more outputs than the caller has room for");
        }
        *output_count = static_cast<int>(found.size());
        for (size_t i = 0; i < found.size(); ++i) {
            outputs[i].type = twin::name_of(found[i].type);
            outputs[i].dims = static_cast<int32_t>(found[i].shape.GetDimNum());
            for (int32_t d = 0; d < outputs[i].dims; ++d) {
                outputs[i].shape[d] = found[i].shape.GetDim(d);
            }
        }
    });
}

int twin_tile(const char* type, const TwinTensor* inputs, int input_count, const char* attrs,
              uint32_t cores, uint64_t ub_bytes, char* text, size_t text_size, char* message,
              size_t message_size)
{
    return guarded(message, message_size, [&] {
        const Operator op(type);
        const auto values = op.attrs(parse_attrs(attrs));
        const auto given = tensors(inputs, input_count);
        auto tiling = op.tile(given, op.infer(given, values), values, {cores, ub_bytes});
        std::ostringstream lines;
        lines << "block_dim=" << tiling.block_dim << "\nkey=" << tiling.key
              << "\nschedule_mode=" << tiling.schedule_mode
              << "\nworkspace=" << (tiling.workspaces.empty() ? 0 : tiling.workspaces[0]) << "\n";
        const auto* data = static_cast<const uint8_t*>(tiling.data.GetData());
        for (const twin::TilingField& field : twin::tiling_fields()) {
            lines << field.name << "=" << field_value(field, data) << "\n";
        }
        write_text(lines.str(), text, text_size);
    });
}

int twin_describe(const char* type, char* text, size_t text_size, char* message, size_t message_size)
{
    return guarded(message, message_size, [&] {
        const ops::OpDef& definition = Operator(type).definition();
        std::ostringstream lines;
        const auto write = [&](const char* kind, const auto& parameters) {
            for (const auto& parameter : parameters) {
                lines << kind << " " << parameter->name << " "
                      << (parameter->option == ops::REQUIRED ? "required" : "optional");
                for (const ge::DataType each : parameter->types) {
                    lines << " " << twin::name_of(each);
                }
                lines << "\n";
            }
        };
        write("input", definition.inputs);
        write("output", definition.outputs);
        static const char* const kinds[] = {"none", "int", "float", "bool"};
        for (const auto& attr : definition.attrs) {
            lines << "attr " << attr->name << " "
                  << (attr->option == ops::REQUIRED ? "required" : "optional") << " "
                  << kinds[static_cast<int>(attr->kind)] << "\n";
        }
        for (const std::string& soc : definition.core.socs) {
            lines << "soc " << soc << "\n";
        }
        write_text(lines.str(), text, text_size);
    });
}

int twin_launch(const char* kernel, int buffers, void* const* data, const uint64_t* sizes,
                const char* roles, const void* tiling, uint64_t tiling_size, uint64_t tiling_key,
                uint32_t blocks, uint64_t ub_bytes, uint64_t* counters, char* message,
                size_t message_size)
{
    return guarded(message, message_size, [&] {
        twin::Launch launch;
        launch.kernel = kernel;
        for (int i = 0; i < buffers; ++i) {
            if (roles[i] == 'w') {
                launch.workspace_bytes = sizes[i] + twin::kLibraryWorkspace;
                continue;
            }
            const auto role = roles[i] == 'o' ? twin::Region::Role::output : twin::Region::Role::input;
            launch.memory.add(std::string(1, roles[i]) + std::to_string(i), role, data[i], sizes[i]);
            launch.arguments.push_back(static_cast<uint8_t*>(data[i]));
        }
        const auto* bytes = static_cast<const uint8_t*>(tiling);
        launch.tiling.assign(bytes, bytes + tiling_size);
        launch.tiling_key = tiling_key;
        launch.blocks = static_cast<int>(blocks);
        launch.ub_bytes = ub_bytes;
        write_counters(twin::run(launch), counters);
    });
}

int twin_counter_count(void) { return kCounterCount; }
}
