// The same calls on a CPU, for tests; built by `python -m kernels.cuda.build --emulation`.
#include "emulation.h"
#include "handlers.h"

#define EMULATED(Handler) \
  [](auto... arrays) { return splat::Handler<splat::Emulation>(splat::Emulation(), arrays...); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatBin, EMULATED(BinHandler),
                              splat::BindBin(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatForward, EMULATED(ForwardHandler),
                              splat::BindForward(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatBackward, EMULATED(BackwardHandler),
                              splat::BindBackward(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatAbsolute, EMULATED(AbsoluteHandler),
                              splat::BindAbsolute(xla::ffi::Ffi::Bind()));

extern "C" void SplatReverseLanes(int reverse) { splat::reverse_lanes = reverse != 0; }
