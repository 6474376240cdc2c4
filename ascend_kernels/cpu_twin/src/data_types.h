// Data types by MindSpore's names.
#pragma once

#include <cstring>

#include "twin/error.h"
#include "twin_host/types.h"

namespace twin {

struct NamedType {
    ge::DataType type;
    const char* name;
};

constexpr NamedType kNamedTypes[] = {
    {ge::DT_FLOAT, "float32"}, {ge::DT_FLOAT16, "float16"}, {ge::DT_BF16, "bfloat16"},
    {ge::DT_INT32, "int32"},   {ge::DT_INT64, "int64"},     {ge::DT_UINT8, "uint8"},
    {ge::DT_INT8, "int8"},     {ge::DT_BOOL, "bool"},
};

inline ge::DataType type_of(const char* name)
{
    for (const NamedType& each : kNamedTypes) {
        if (std::strcmp(each.name, name) == 0) {
            return each.type;
        }
    }
    return ge::DT_UNDEFINED;
}

inline const char* name_of(ge::DataType type)
{
    for (const NamedType& each : kNamedTypes) {
        if (each.type == type) {
            return each.name;
        }
    }
    return "undefined";
}

}  // namespace twin
