// How the twin reports a broken rule: one exception, one line of text.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace twin {

// A rule of the hardware or of the AscendC API that a kernel broke.
struct Violation : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Joins its arguments into the message and throws.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts)
{
    std::ostringstream text;
    (text << ... << parts);
    throw Violation(text.str());
}

}  // namespace twin
