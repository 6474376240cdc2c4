// Stand-ins for the contexts that tiling and inference functions are called with.
#pragma once

#include <array>
#include <optional>

#include "twin_host/types.h"

namespace fe {

// The machine that tiling is made for.
struct PlatFormInfos {
    uint32_t vector_cores = 8;
    uint64_t ub_bytes = 196608;
};

}  // namespace fe

namespace gert {

// What a tiling function writes its data into.
class TilingData {
public:
    void* GetData() { return bytes_.data(); }
    size_t GetCapacity() const { return bytes_.size(); }
    size_t GetDataSize() const { return size_; }
    void SetDataSize(size_t size) { size_ = size; }

private:
    std::array<uint8_t, 4096> bytes_{};
    size_t size_ = 0;
};

// An input as the framework describes it; absent optional inputs have no value.
struct TwinInput {
    StorageShape shape;
    CompileTimeTensorDesc description;
};

// What all contexts know.
class TwinContext {
public:
    std::string node_name;
    std::vector<std::optional<TwinInput>> inputs;
    RuntimeAttrs attrs;

    const char* GetNodeName() const { return node_name.c_str(); }
    const RuntimeAttrs* GetAttrs() const { return &attrs; }
    size_t GetComputeNodeInputNum() const { return inputs.size(); }

protected:
    const TwinInput* input(size_t i) const
    {
        return i < inputs.size() && inputs[i] ? &*inputs[i] : nullptr;
    }
};

class TilingContext : public TwinContext {
public:
    std::vector<StorageShape> output_shapes;
    std::vector<CompileTimeTensorDesc> output_descriptions;
    fe::PlatFormInfos platform;
    TilingData data;
    uint64_t key = 0;
    uint32_t block_dim = 0;
    uint32_t schedule_mode = 0;
    std::vector<size_t> workspaces;

    const StorageShape* GetInputShape(size_t i) const { return input(i) ? &input(i)->shape : nullptr; }
    const StorageShape* GetOptionalInputShape(size_t i) const { return GetInputShape(i); }
    const CompileTimeTensorDesc* GetInputDesc(size_t i) const
    {
        return input(i) ? &input(i)->description : nullptr;
    }
    const CompileTimeTensorDesc* GetOptionalInputDesc(size_t i) const { return GetInputDesc(i); }
    const StorageShape* GetOutputShape(size_t i) const
    {
        return i < output_shapes.size() ? &output_shapes[i] : nullptr;
    }
    const CompileTimeTensorDesc* GetOutputDesc(size_t i) const
    {
        return i < output_descriptions.size() ? &output_descriptions[i] : nullptr;
    }

    fe::PlatFormInfos* GetPlatformInfo() { return &platform; }
    TilingData* GetRawTilingData() { return &data; }

    ge::graphStatus SetTilingKey(uint64_t value)
    {
        key = value;
        return ge::GRAPH_SUCCESS;
    }
    uint64_t GetTilingKey() const { return key; }
    ge::graphStatus SetBlockDim(uint32_t value)
    {
        block_dim = value;
        return ge::GRAPH_SUCCESS;
    }
    uint32_t GetBlockDim() const { return block_dim; }
    // 1: all blocks start together, which SyncAll needs.
    ge::graphStatus SetScheduleMode(uint32_t value)
    {
        schedule_mode = value;
        return ge::GRAPH_SUCCESS;
    }
    size_t* GetWorkspaceSizes(size_t count)
    {
        workspaces.assign(count, 0);
        return workspaces.data();
    }
};

class InferShapeContext : public TwinContext {
public:
    std::vector<Shape> outputs;

    const Shape* GetInputShape(size_t i) const
    {
        return input(i) ? &input(i)->shape.GetStorageShape() : nullptr;
    }
    const Shape* GetOptionalInputShape(size_t i) const { return GetInputShape(i); }
    const CompileTimeTensorDesc* GetInputDesc(size_t i) const
    {
        return input(i) ? &input(i)->description : nullptr;
    }
    Shape* GetOutputShape(size_t i) { return i < outputs.size() ? &outputs[i] : nullptr; }
};

class InferDataTypeContext : public TwinContext {
public:
    std::vector<ge::DataType> outputs;

    ge::DataType GetInputDataType(size_t i) const
    {
        return input(i) ? input(i)->description.GetDataType() : ge::DT_UNDEFINED;
    }
    ge::DataType GetOptionalInputDataType(size_t i) const { return GetInputDataType(i); }
    ge::graphStatus SetOutputDataType(size_t i, ge::DataType type)
    {
        if (i >= outputs.size()) {
            return ge::GRAPH_FAILED;
        }
        outputs[i] = type;
        return ge::GRAPH_SUCCESS;
    }
};

}  // namespace gert
