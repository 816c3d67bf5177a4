// Scratch memory of a call: from XLA on a GPU, from an allocator as strict as XLA's in emulation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace splat {

// XLA refuses to align to more. It is what a float4 needs; CUB aligns what it is given by itself.
constexpr size_t kScratchAlignment = 16;

template <class T, class Allocator>
T* AllocateScratch(Allocator& allocator, int64_t count) {
  static_assert(alignof(T) <= kScratchAlignment);
  const size_t bytes = count > 0 ? count * sizeof(T) : 1;
  const std::optional<void*> memory = allocator.Allocate(bytes, kScratchAlignment);
  if (!memory) {
    throw std::runtime_error("splatting asked XLA for " + std::to_string(bytes) +
                             " bytes to work in and got none; if memory is short, render fewer "
                             "images at once or lower `capacity`");
  }
  return static_cast<T*>(*memory);
}

}  // namespace splat
