// Stand-in for CANN's OpDef: keeps what an operator's definition says, for the runner to check and
// to call.
#pragma once

#include <functional>
#include <map>
#include <memory>

#include "twin_host/context.h"

namespace ops {

enum Option { IGNORE = 0, OPTIONAL = 1, REQUIRED = 2, DYNAMIC = 3, VIRTUAL = 4 };

class OpParamDef {
public:
    explicit OpParamDef(std::string name) : name(std::move(name)) {}

    OpParamDef& ParamType(Option value)
    {
        option = value;
        return *this;
    }
    OpParamDef& DataType(std::vector<ge::DataType> values)
    {
        types = std::move(values);
        return *this;
    }
    OpParamDef& Format(std::vector<ge::Format> values)
    {
        formats = std::move(values);
        return *this;
    }
    OpParamDef& UnknownShapeFormat(std::vector<ge::Format> values)
    {
        unknown_formats = std::move(values);
        return *this;
    }
    OpParamDef& AutoContiguous() { return *this; }

    std::string name;
    Option option = REQUIRED;
    std::vector<ge::DataType> types;
    std::vector<ge::Format> formats, unknown_formats;
};

class OpAttrDef {
public:
    enum class Kind { none, integer, real, boolean };

    explicit OpAttrDef(std::string name) : name(std::move(name)) {}

    OpAttrDef& AttrType(Option value)
    {
        option = value;
        return *this;
    }
    OpAttrDef& Int() { return as(Kind::integer); }
    OpAttrDef& Int(int64_t value)
    {
        default_value.integer = value;
        return as(Kind::integer);
    }
    OpAttrDef& Float() { return as(Kind::real); }
    OpAttrDef& Float(float value)
    {
        default_value.real = value;
        return as(Kind::real);
    }
    OpAttrDef& Bool() { return as(Kind::boolean); }
    OpAttrDef& Bool(bool value)
    {
        default_value.boolean = value;
        return as(Kind::boolean);
    }

    std::string name;
    Option option = REQUIRED;
    Kind kind = Kind::none;
    gert::RuntimeAttrs::Value default_value;

private:
    OpAttrDef& as(Kind value)
    {
        kind = value;
        return *this;
    }
};

using TilingFunction = ge::graphStatus (*)(gert::TilingContext*);
using InferShapeFunction = ge::graphStatus (*)(gert::InferShapeContext*);
using InferDataTypeFunction = ge::graphStatus (*)(gert::InferDataTypeContext*);

// How CANN compiles the kernel; means nothing to the twin.
class OpAICoreConfig {
public:
    OpAICoreConfig& DynamicCompileStaticFlag(bool) { return *this; }
    OpAICoreConfig& DynamicFormatFlag(bool) { return *this; }
    OpAICoreConfig& DynamicRankSupportFlag(bool) { return *this; }
    OpAICoreConfig& DynamicShapeSupportFlag(bool) { return *this; }
    OpAICoreConfig& NeedCheckSupportFlag(bool) { return *this; }
    OpAICoreConfig& PrecisionReduceFlag(bool) { return *this; }
    OpAICoreConfig& ExtendCfgInfo(const char*, const char*) { return *this; }
};

class OpAICoreDef {
public:
    OpAICoreDef& SetTiling(TilingFunction function)
    {
        tiling = function;
        return *this;
    }
    OpAICoreDef& AddConfig(const char* soc)
    {
        socs.emplace_back(soc);
        return *this;
    }
    OpAICoreDef& AddConfig(const char* soc, OpAICoreConfig&) { return AddConfig(soc); }

    TilingFunction tiling = nullptr;
    std::vector<std::string> socs;
};

class OpDef {
public:
    explicit OpDef(const char* type) : type(type) {}

    OpParamDef& Input(const char* name) { return find_or_add(inputs, name); }
    OpParamDef& Output(const char* name) { return find_or_add(outputs, name); }
    OpAttrDef& Attr(const char* name) { return find_or_add(attrs, name); }
    OpDef& SetInferShape(InferShapeFunction function)
    {
        infer_shape = function;
        return *this;
    }
    OpDef& SetInferDataType(InferDataTypeFunction function)
    {
        infer_data_type = function;
        return *this;
    }
    OpAICoreDef& AICore() { return core; }

    std::string type;
    std::vector<std::unique_ptr<OpParamDef>> inputs, outputs;
    std::vector<std::unique_ptr<OpAttrDef>> attrs;
    InferShapeFunction infer_shape = nullptr;
    InferDataTypeFunction infer_data_type = nullptr;
    OpAICoreDef core;

private:
    template <typename Definition>
    static Definition& find_or_add(std::vector<std::unique_ptr<Definition>>& all, const char* name)
    {
        for (auto& known : all) {
            if (known->name == name) {
                return *known;
            }
        }
        all.push_back(std::make_unique<Definition>(name));
        return *all.back();
    }
};

}  // namespace ops

namespace twin {

// All operators that OP_ADD named, by OpType.
inline std::map<std::string, std::unique_ptr<ops::OpDef>>& operators()
{
    static std::map<std::string, std::unique_ptr<ops::OpDef>> table;
    return table;
}

struct RegisterOperator {
    explicit RegisterOperator(std::unique_ptr<ops::OpDef> definition)
    {
        std::string type = definition->type;
        operators()[type] = std::move(definition);
    }
};

}  // namespace twin

#define OP_ADD(type)                                    \
    static const twin::RegisterOperator register_##type( \
        std::unique_ptr<ops::OpDef>(new type(#type)))
