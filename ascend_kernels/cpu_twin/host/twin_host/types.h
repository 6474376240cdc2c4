// Stand-ins for the types of CANN's graph engine that operator definitions use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ge {

enum DataType {
    DT_FLOAT = 0,
    DT_FLOAT16 = 1,
    DT_INT8 = 2,
    DT_INT32 = 3,
    DT_UINT8 = 4,
    DT_INT16 = 6,
    DT_UINT32 = 8,
    DT_INT64 = 9,
    DT_BOOL = 12,
    DT_BF16 = 27,
    DT_UNDEFINED = 28,
};

enum Format { FORMAT_NCHW = 0, FORMAT_NHWC = 1, FORMAT_ND = 2 };

using graphStatus = uint32_t;
constexpr graphStatus GRAPH_SUCCESS = 0;
constexpr graphStatus GRAPH_FAILED = 0xFFFFFFFF;
constexpr graphStatus GRAPH_PARAM_INVALID = 50331649;

inline int GetSizeByDataType(DataType type)
{
    switch (type) {
        case DT_INT8:
        case DT_UINT8:
        case DT_BOOL: return 1;
        case DT_FLOAT16:
        case DT_INT16:
        case DT_BF16: return 2;
        case DT_FLOAT:
        case DT_INT32:
        case DT_UINT32: return 4;
        case DT_INT64: return 8;
        default: return -1;
    }
}

}  // namespace ge

namespace gert {

class Shape {
public:
    Shape() = default;
    Shape(std::initializer_list<int64_t> dims) : dims_(dims) {}

    size_t GetDimNum() const { return dims_.size(); }
    void SetDimNum(size_t count) { dims_.resize(count); }
    int64_t GetDim(size_t i) const { return i < dims_.size() ? dims_[i] : -1; }
    void SetDim(size_t i, int64_t value)
    {
        if (i < dims_.size()) {
            dims_[i] = value;
        }
    }
    Shape& AppendDim(int64_t value)
    {
        dims_.push_back(value);
        return *this;
    }
    int64_t operator[](size_t i) const { return dims_[i]; }
    int64_t& operator[](size_t i) { return dims_[i]; }
    bool operator==(const Shape& other) const { return dims_ == other.dims_; }
    bool operator!=(const Shape& other) const { return dims_ != other.dims_; }

    int64_t GetShapeSize() const
    {
        int64_t size = 1;
        for (const int64_t dim : dims_) {
            size *= dim;
        }
        return size;
    }

private:
    std::vector<int64_t> dims_;
};

// A shape as the framework knows it and as it lies in memory; the twin has only ND, so both agree.
class StorageShape {
public:
    StorageShape() = default;
    explicit StorageShape(Shape shape) : shape_(std::move(shape)) {}
    const Shape& GetStorageShape() const { return shape_; }
    const Shape& GetOriginShape() const { return shape_; }

private:
    Shape shape_;
};

class CompileTimeTensorDesc {
public:
    CompileTimeTensorDesc() = default;
    explicit CompileTimeTensorDesc(ge::DataType type) : type_(type) {}
    ge::DataType GetDataType() const { return type_; }

private:
    ge::DataType type_ = ge::DT_UNDEFINED;
};

// Attributes in the order of the operator's definition.
class RuntimeAttrs {
public:
    struct Value {
        int64_t integer = 0;
        float real = 0;
        bool boolean = false;
    };
    std::vector<Value> values;

    const int64_t* GetInt(size_t i) const { return i < values.size() ? &values[i].integer : nullptr; }
    const float* GetFloat(size_t i) const { return i < values.size() ? &values[i].real : nullptr; }
    const bool* GetBool(size_t i) const { return i < values.size() ? &values[i].boolean : nullptr; }

    template <typename T>
    const T* GetAttrPointer(size_t i) const
    {
        if constexpr (std::is_same_v<T, bool>) {
            return GetBool(i);
        } else if constexpr (std::is_same_v<T, float>) {
            return GetFloat(i);
        } else {
            static_assert(std::is_same_v<T, int64_t>, "attributes are int64_t, float or bool");
            return GetInt(i);
        }
    }

    size_t GetAttrNum() const { return values.size(); }
};

}  // namespace gert
