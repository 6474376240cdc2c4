// The operators as MindSpore's ops.Custom (func_type "aot") calls them on CPU: one C function each,
// named by OpType. The last input is an int32 tensor with the attributes in the definition's order, a
// float by its bits; an optional input may be left out when those behind it are.
#include <cstdio>
#include <cstring>

#include "data_types.h"
#include "operator.h"

namespace {

// The twin runs blocks one after the other, so the number only has to exercise the split.
constexpr twin::Machine kMachine{8, 196608};

int run_operator(const char* type, int count, void** data, int* dims, int64_t** shapes,
                 const char** types)
{
    try {
        const twin::Operator op(type);
        const auto& definition = op.definition();
        std::vector<twin::Tensor> given(count);
        for (int i = 0; i < count; ++i) {
            given[i].data = data[i];
            given[i].type = twin::type_of(types[i]);
            for (int d = 0; d < dims[i]; ++d) {
                given[i].shape.AppendDim(shapes[i][d]);
            }
        }
        const int outputs = static_cast<int>(definition.outputs.size());
        const int present = count - outputs - 1;  // inputs without the attributes
        int optional = present;
        for (const auto& input : definition.inputs) {
            optional -= input->option == ops::REQUIRED;
        }
        std::vector<twin::Tensor> inputs;
        auto next = given.begin();
        for (const auto& input : definition.inputs) {
            const bool there = input->option == ops::REQUIRED || optional-- > 0;
            inputs.push_back(there ? *next++ : twin::Tensor());
        }
        const auto* attrs = static_cast<const int32_t*>(data[present]);
        std::map<std::string, double> values;
        for (size_t i = 0; i < definition.attrs.size(); ++i) {
            float real = 0;
            std::memcpy(&real, attrs + i, sizeof(real));
            const bool is_real = definition.attrs[i]->kind == ops::OpAttrDef::Kind::real;
            values[definition.attrs[i]->name] = is_real ? real : static_cast<double>(attrs[i]);
        }
        op.run(inputs, {given.end() - outputs, given.end()}, op.attrs(values), kMachine);
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "CPU twin of %s: %s\n", type, error.what());
        return 1;
    }
}

}  // namespace

#define TWIN_AOT(TYPE)                                                                    \
    extern "C" int TYPE(int count, void** data, int* dims, int64_t** shapes,              \
                        const char** types, void*, void*)                                 \
    {                                                                                     \
        return run_operator(#TYPE, count, data, dims, shapes, types);                     \
    }

TWIN_AOT(MoeGatingTopK)
TWIN_AOT(MoeGatingTopKGrad)
TWIN_AOT(MoeExpertCapacity)
TWIN_AOT(MoeDispatch)
TWIN_AOT(MoeDispatchGrad)
TWIN_AOT(MoeCombine)
TWIN_AOT(MoeCombineGrad)
TWIN_AOT(MoePermute)
TWIN_AOT(MoeSwiglu)
TWIN_AOT(MoeSwigluGrad)
