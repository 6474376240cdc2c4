// Stand-in for CANN's header: tiling data as a class with setters for the host, and, where
// TWIN_KERNEL_SIDE is defined, as the plain struct that CANN's build generates for the kernel.
// Both have the same members in the same order, hence the same layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#ifdef TWIN_KERNEL_SIDE

#define BEGIN_TILING_DATA_DEF(name) struct name {
#define TILING_DATA_FIELD_DEF(type, field) type field;
#define TILING_DATA_FIELD_DEF_ARR(type, count, field) type field[count];
#define TILING_DATA_FIELD_DEF_STRUCT(type, field) type field;
#define END_TILING_DATA_DEF }
#define REGISTER_TILING_DATA_CLASS(op, name) using TwinTilingData = name;

#else

namespace twin {

// Where a field lies, so that tests can read tiling data by name.
struct TilingField {
    std::string type, name;
    size_t offset, count;
};

// Collects the fields while a tiling class is constructed.
inline std::vector<TilingField>& tiling_fields()
{
    static thread_local std::vector<TilingField> fields;
    return fields;
}

inline void note_tiling_field(const char* type, const char* name, void* base, void* field,
                              size_t count)
{
    const size_t offset = static_cast<char*>(field) - static_cast<char*>(base);
    if (offset == 0) {
        tiling_fields().clear();
    }
    tiling_fields().push_back({type, name, offset, count});
}

}  // namespace twin

#define BEGIN_TILING_DATA_DEF(name)                                                     \
    class name {                                                                        \
    public:                                                                             \
        void SaveToBuffer(void* buffer, size_t capacity) const                          \
        {                                                                               \
            std::memcpy(buffer, this, std::min(capacity, sizeof(*this)));               \
        }                                                                               \
        size_t GetDataSize() const { return sizeof(*this); }

#define TILING_DATA_FIELD_DEF(type, field)                                              \
public:                                                                                 \
    void set_##field(type value) { field##_ = value; }                                  \
    type get_##field() const { return field##_; }                                       \
                                                                                        \
private:                                                                                \
    type field##_ = (twin::note_tiling_field(#type, #field, this, &field##_, 1), type());

#define TILING_DATA_FIELD_DEF_ARR(type, size, field)                                    \
public:                                                                                 \
    void set_##field(const type* values) { std::memcpy(field##_, values, sizeof(field##_)); } \
    type* get_##field() { return field##_; }                                            \
                                                                                        \
private:                                                                                \
    type field##_[size] = {(twin::note_tiling_field(#type, #field, this, field##_, size), type())};

#define TILING_DATA_FIELD_DEF_STRUCT(type, field) \
public:                                           \
    type field;

#define END_TILING_DATA_DEF }
#define REGISTER_TILING_DATA_CLASS(op, name) static_assert(sizeof(name) > 0, #op);

#endif
