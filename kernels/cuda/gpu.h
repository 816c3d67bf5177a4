// Runs the kernels on an NVIDIA GPU: one stream, scratch memory from XLA, sorts and sums from CUB.
#pragma once

#include <cuda_runtime.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <stdexcept>

#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace splat {

constexpr int kThreads = 256;      // a block of `Each`
constexpr int kWarpsPerBlock = 2;  // of `EachWarp`: few, as tiles take unequal time

struct GpuWarp {
  template <class T>
  struct PerLane {
    T value;
    __device__ __forceinline__ T& operator[](int) { return value; }
  };

  int lane;

  template <class F>
  __device__ __forceinline__ void Each(F f) {
    f(lane);
    __syncwarp();
  }
  template <class F>
  __device__ __forceinline__ bool Any(F f) {
    return __any_sync(~0u, f(lane));
  }
  template <class F>
  __device__ __forceinline__ int Max(F f) {
    return __reduce_max_sync(~0u, f(lane));
  }
};

template <class F>
__global__ void __launch_bounds__(kThreads) RunEach(int64_t count, const F f) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < count) f(i);
}

template <class F>
__global__ void __launch_bounds__(kWarpsPerBlock * 32) RunEachWarp(int64_t count, const F f) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto* shared = reinterpret_cast<typename F::Shared*>(shared_memory);
  const int warp_of_block = threadIdx.x / 32;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kWarpsPerBlock) + warp_of_block;
  if (i >= count) return;
  GpuWarp warp{static_cast<int>(threadIdx.x % 32)};
  f(warp, i, shared[warp_of_block]);
}

class Gpu {
 public:
  Gpu(cudaStream_t stream, xla::ffi::ScratchAllocator& scratch)
      : stream_(stream), scratch_(scratch) {}

  template <class T>
  T* Scratch(int64_t count) {
    return AllocateScratch<T>(scratch_, count);
  }

  template <class F>
  void Each(int64_t count, F f) {
    if (count == 0) return;
    RunEach<<<Blocks(count, kThreads), kThreads, 0, stream_>>>(count, f);
    Check(cudaGetLastError());
  }

  template <class F>
  void EachWarp(int64_t count, F f) {
    if (count == 0) return;
    constexpr int bytes = kWarpsPerBlock * sizeof(typename F::Shared);
    // A block gets more than 48 KiB of shared memory only on request.
    Check(cudaFuncSetAttribute(RunEachWarp<F>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    RunEachWarp<<<Blocks(count, kWarpsPerBlock), kWarpsPerBlock * 32, bytes, stream_>>>(count, f);
    Check(cudaGetLastError());
  }

  void Fill(void* memory, int byte, int64_t bytes) {
    Check(cudaMemsetAsync(memory, byte, bytes, stream_));
  }

  template <class Key>
  void SortPairs(const Key* keys, Key* sorted_keys, const int* values, int* sorted_values,
                 int64_t count, int bits) {
    WithTemporary([&](void* temporary, size_t& bytes) {
      return cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, sorted_keys, values,
                                             sorted_values, count, 0, bits, stream_);
    });
  }

  void InclusiveSum(const int64_t* from, int64_t* to, int64_t count) {
    WithTemporary([&](void* temporary, size_t& bytes) {
      return cub::DeviceScan::InclusiveSum(temporary, bytes, from, to, count, stream_);
    });
  }

 private:
  // CUB's calls first say how much memory they need, then run in it.
  template <class Call>
  void WithTemporary(Call call) {
    size_t bytes = 0;
    Check(call(nullptr, bytes));
    Check(call(Scratch<char>(bytes), bytes));
  }

  static unsigned Blocks(int64_t count, int per_block) {
    const int64_t blocks = (count + per_block - 1) / per_block;
    if (blocks > INT32_MAX) throw std::runtime_error("too many tiles or Gaussians for one launch");
    return static_cast<unsigned>(blocks);
  }

  static void Check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  }

  cudaStream_t stream_;
  xla::ffi::ScratchAllocator& scratch_;
};

}  // namespace splat
