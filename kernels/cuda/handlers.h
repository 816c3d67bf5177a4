// The calls that XLA makes: bin, composite forward, composite backward, and the sums of absolute
// gradients. Shapes are those of the arrays; the kernels do the work on a `Device` (gpu.h or
// emulation.h).
#pragma once

#include <exception>
#include <utility>

#include "absolute.h"
#include "composite.h"
#include "xla/ffi/api/ffi.h"

namespace splat {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using FloatsOut = ffi::Result<Floats>;
using IntsOut = ffi::Result<Ints>;

template <class T, class B>
const T* In(const B& buffer) {
  return reinterpret_cast<const T*>(buffer.typed_data());
}
template <class T, class B>
T* Out(B& buffer) {
  return reinterpret_cast<T*>(buffer->typed_data());
}
template <class B>
int Size(const B& buffer, int axis) {
  return static_cast<int>(buffer.dimensions()[axis]);
}

// What the kernels throw (no memory, a failed launch) becomes the error that JAX raises.
template <class F>
ffi::Error Guarded(F f) {
  try {
    f();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, error.what());
  }
  return ffi::Error::Success();
}

template <class Device>
ffi::Error BinHandler(Device device, Floats geometry, Ints boxes, IntsOut slots,
                      IntsOut slot_gaussian, IntsOut ranges, IntsOut spans, IntsOut overflow) {
  return Guarded([&] {
    Bin(device, Binning{In<float4>(geometry), In<int4>(boxes), Size(geometry, 0),
                        Size(geometry, 1), Size(*ranges, 1), Size(*ranges, 2), Size(*slots, 1),
                        Out<int>(slots), Out<int>(slot_gaussian), Out<int2>(ranges),
                        Out<int2>(spans), Out<int>(overflow)});
  });
}

inline Composite MakeComposite(const Floats& geometry, const Floats& features, const Ints& slots,
                               const Ints& slot_gaussian, const Ints& ranges, int width,
                               int height) {
  return {In<float4>(geometry), In<float4>(features), In<int>(slots), In<int>(slot_gaussian),
          In<int2>(ranges),     width,                height,         Size(ranges, 1),
          Size(ranges, 2)};
}

// Calls f with the number of features as a compile-time constant.
template <class F>
ffi::Error WithFeatures(int count, F f) {
  switch (count) {
    case 4:
      return Guarded([&] { f(std::integral_constant<int, 4>()); });
    case 8:
      return Guarded([&] { f(std::integral_constant<int, 8>()); });
    case 16:
      return Guarded([&] { f(std::integral_constant<int, 16>()); });
    case 32:
      return Guarded([&] { f(std::integral_constant<int, 32>()); });
  }
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "features must number 4, 8, 16 or 32");
}

template <class Device>
ffi::Error ForwardHandler(Device device, Floats geometry, Floats features, Ints slots,
                          Ints slot_gaussian, Ints ranges, FloatsOut out, FloatsOut alpha,
                          FloatsOut transmittance, IntsOut last) {
  const Composite in = MakeComposite(geometry, features, slots, slot_gaussian, ranges,
                                     Size(*out, 2), Size(*out, 1));
  const int64_t tiles = ranges.element_count() / 2;
  return WithFeatures(Size(features, 2), [&](auto k) {
    Forward<k()>(device, tiles, in, Out<float4>(out), Out<float>(alpha),
                 Out<float>(transmittance), Out<int>(last));
  });
}

template <class Device>
ffi::Error BackwardHandler(Device device, Floats geometry, Floats features, Ints slots,
                           Ints slot_gaussian, Ints ranges, Ints spans, Floats transmittance,
                           Ints last, Floats out_gradient, Floats alpha_gradient,
                           FloatsOut geometry_gradient, FloatsOut feature_gradient) {
  const Composite in = MakeComposite(geometry, features, slots, slot_gaussian, ranges,
                                     Size(out_gradient, 2), Size(out_gradient, 1));
  const int64_t tiles = ranges.element_count() / 2;
  const int64_t splats = spans.element_count() / 2;
  return WithFeatures(Size(features, 2), [&](auto k) {
    Backward<k()>(device, tiles, splats, slots.element_count(), in, In<int2>(spans),
                  In<float>(transmittance), In<int>(last), In<float4>(out_gradient),
                  In<float>(alpha_gradient), Out<float>(geometry_gradient),
                  Out<float>(feature_gradient));
  });
}

template <class Device>
ffi::Error AbsoluteHandler(Device device, Floats geometry, Floats features, Ints slots,
                           Ints slot_gaussian, Ints ranges, Ints spans, Floats transmittance,
                           Ints last, Floats out_gradient, Floats alpha_gradient,
                           FloatsOut absolute) {
  const Composite in = MakeComposite(geometry, features, slots, slot_gaussian, ranges,
                                     Size(out_gradient, 2), Size(out_gradient, 1));
  return Guarded([&] {
    Absolute(device, ranges.element_count() / 2, spans.element_count() / 2, slots.element_count(),
             in, Size(features, 2) / 4, In<int2>(spans), In<float>(transmittance), In<int>(last),
             In<float4>(out_gradient), In<float>(alpha_gradient), Out<float2>(absolute));
  });
}

// Adds each call's arrays to a binding that already has its context.
template <class Binding>
auto BindBin(Binding binding) {
  return std::move(binding)
      .template Arg<Floats>()
      .template Arg<Ints>()
      .template Ret<Ints>()
      .template Ret<Ints>()
      .template Ret<Ints>()
      .template Ret<Ints>()
      .template Ret<Ints>();
}

template <class Binding>
auto BindForward(Binding binding) {
  return std::move(binding)
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Ints>()
      .template Arg<Ints>()
      .template Arg<Ints>()
      .template Ret<Floats>()
      .template Ret<Floats>()
      .template Ret<Floats>()
      .template Ret<Ints>();
}

template <class Binding>
auto BindWayBack(Binding&& binding) {
  return std::move(binding)
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Ints>()
      .template Arg<Ints>()
      .template Arg<Ints>()
      .template Arg<Ints>()
      .template Arg<Floats>()
      .template Arg<Ints>()
      .template Arg<Floats>()
      .template Arg<Floats>();
}

template <class Binding>
auto BindBackward(Binding binding) {
  return BindWayBack(std::move(binding)).template Ret<Floats>().template Ret<Floats>();
}

template <class Binding>
auto BindAbsolute(Binding binding) {
  return BindWayBack(std::move(binding)).template Ret<Floats>();
}

}  // namespace splat
