// Runs the kernels on a CPU, lane after lane, so that tests can hold them to the oracle without a
// GPU. Lanes of a phase may run in either order; equal results show that no phase reads what
// another lane writes in it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "composite.h"
#include "scratch.h"

namespace splat {

inline bool reverse_lanes = false;

struct EmulatedWarp {
  template <class T>
  struct PerLane {
    T values[kLanes];
    T& operator[](int lane) { return values[lane]; }
  };

  template <class F>
  void Each(F f) {
    for (int i = 0; i < kLanes; ++i) f(reverse_lanes ? kLanes - 1 - i : i);
  }
  template <class F>
  bool Any(F f) {
    bool any = false;
    for (int lane = 0; lane < kLanes; ++lane) any |= f(lane);
    return any;
  }
  template <class F>
  int Max(F f) {
    int most = f(0);
    for (int lane = 1; lane < kLanes; ++lane) most = std::max(most, f(lane));
    return most;
  }
};

// As XLA's ScratchAllocator: refuses to align to more than 16 bytes, and never happens to. Memory
// is filled with a pattern, as a GPU's holds anything: what is read must have been written.
class EmulatedAllocator {
 public:
  std::optional<void*> Allocate(size_t bytes, size_t alignment) {
    if (alignment > 16) return std::nullopt;
    void* block = memory_.emplace_back(bytes + 48, 0x7F).data();
    size_t room = bytes + 48;
    return static_cast<char*>(std::align(32, bytes + 16, block, room)) + 16;
  }

 private:
  std::deque<std::vector<char>> memory_;
};

class Emulation {
 public:
  template <class T>
  T* Scratch(int64_t count) {
    return AllocateScratch<T>(allocator_, count);
  }

  template <class F>
  void Each(int64_t count, F f) {
    for (int64_t i = 0; i < count; ++i) f(reverse_lanes ? count - 1 - i : i);
  }

  template <class F>
  void EachWarp(int64_t count, F f) {
    auto shared = std::make_unique<typename F::Shared>();
    for (int64_t i = 0; i < count; ++i) {
      Fill(shared.get(), 0x7F, sizeof(typename F::Shared));
      EmulatedWarp warp;
      f(warp, i, *shared);
    }
  }

  void Fill(void* memory, int byte, int64_t bytes) { std::memset(memory, byte, bytes); }

  // Stable, and blind to bits above `bits`, as a radix sort is.
  template <class Key>
  void SortPairs(const Key* keys, Key* sorted_keys, const int* values, int* sorted_values,
                 int64_t count, int bits) {
    const Key mask = bits < 8 * static_cast<int>(sizeof(Key)) ? (Key{1} << bits) - 1 : ~Key{0};
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
      return (keys[i] & mask) < (keys[j] & mask);
    });
    for (int64_t i = 0; i < count; ++i) {
      sorted_keys[i] = keys[order[i]];
      sorted_values[i] = values[order[i]];
    }
  }

  void InclusiveSum(const int64_t* from, int64_t* to, int64_t count) {
    std::partial_sum(from, from + count, to);
  }

 private:
  EmulatedAllocator allocator_;
};

}  // namespace splat
