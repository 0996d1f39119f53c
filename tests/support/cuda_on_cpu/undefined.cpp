// What the compiler calls for -fsanitize=undefined, whose own library would end the process.
#include <cstdint>
#include <string>

#include "executor.h"

namespace {

struct Place {  // every description that the compiler passes begins with one
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void fail_at(const Place* place, const char* what) {
  const std::string file = place->file ? place->file : "?";
  emulation::fail(std::string(what) + " in " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(place->line));
}

}  // namespace

#define UNDEFINED(name, what) \
  extern "C" void __ubsan_handle_##name##_abort(const Place* place) { fail_at(place, what); }
UNDEFINED(type_mismatch_v1, "misaligned address or null pointer")
UNDEFINED(alignment_assumption, "misaligned address")
UNDEFINED(out_of_bounds, "index out of bounds")
UNDEFINED(pointer_overflow, "pointer overflow")
UNDEFINED(add_overflow, "signed overflow")
UNDEFINED(sub_overflow, "signed overflow")
UNDEFINED(mul_overflow, "signed overflow")
UNDEFINED(negate_overflow, "signed overflow")
UNDEFINED(divrem_overflow, "division by zero, or overflow of it")
UNDEFINED(shift_out_of_bounds, "shift out of bounds")
UNDEFINED(load_invalid_value, "invalid value of a bool or an enumeration")
UNDEFINED(nonnull_arg, "null argument")
UNDEFINED(nonnull_return_v1, "null result")
UNDEFINED(invalid_builtin, "invalid argument of a builtin")
extern "C" void __ubsan_handle_builtin_unreachable(const Place* place) { fail_at(place, "unreachable code"); }
extern "C" void __ubsan_handle_missing_return(const Place* place) { fail_at(place, "missing return"); }
