// How the twin reports a broken rule: one exception, one line of text.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace twin {

// A rule of the hardware or of the AscendC API that a kernel broke.
struct Violation : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A piece of a message: text that outlives the call, or an integer.
struct Part {
    Part(const char* text) : text(text) {}
    Part(const std::string& text) : text(text.c_str()) {}
    template <typename Integer, typename = std::enable_if_t<std::is_integral_v<Integer>>>
    Part(Integer number) : number(static_cast<int64_t>(number))
    {
    }
    const char* text = nullptr;
    int64_t number = 0;
};

[[noreturn]] void fail_with(std::initializer_list<Part> parts);

// Joins its arguments into the message and throws.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts)
{
    fail_with({Part(parts)...});
}

}  // namespace twin
