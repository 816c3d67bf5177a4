// The library that JAX loads on NVIDIA GPUs; built by `python -m kernels.cuda.build`.
#include "gpu.h"
#include "handlers.h"

// `Handler(stream, scratch, arrays...)` from `Handler(device, arrays...)`.
#define ON_GPU(Handler)                                                              \
  [](cudaStream_t stream, xla::ffi::ScratchAllocator scratch, auto... arrays) {      \
    return splat::Handler<splat::Gpu>(splat::Gpu(stream, scratch), arrays...);       \
  }

static auto WithContext() {
  return xla::ffi::Ffi::Bind()
      .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
      .Ctx<xla::ffi::ScratchAllocator>();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatBin, ON_GPU(BinHandler), splat::BindBin(WithContext()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatForward, ON_GPU(ForwardHandler),
                              splat::BindForward(WithContext()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatBackward, ON_GPU(BackwardHandler),
                              splat::BindBackward(WithContext()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatAbsolute, ON_GPU(AbsoluteHandler),
                              splat::BindAbsolute(WithContext()));
