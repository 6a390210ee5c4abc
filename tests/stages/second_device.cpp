// A second device that computes on the CPU, and refuses what a GPU refuses: tensors of two devices in one operator. It
// has no generators either: what is drawn by a seed shall not depend on the device. Autocast casts on it as on CUDA.
//
// Memory is the heap's. Operators that make tensors, copy or view are here; every other one is the CPU's own, by torch's
// fallback, after its arguments were looked at.

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <unordered_set>

namespace {

using at::Tensor;
using c10::IntArrayRef;
using std::optional;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device PLACE(KIND, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

struct Heap final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* memory = size ? std::malloc(size) : nullptr;
    return {memory, memory, &std::free, PLACE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
Heap heap;
REGISTER_ALLOCATOR(KIND, &heap);

// One device of one stream, on which everything has happened already.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, PLACE); }
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return PLACE; }
  c10::Device getDevice() const override { return PLACE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream other) const noexcept override { return other; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return PLACE; }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto fresh = heap.allocate(size);
    if (storage.data() && size) std::memcpy(fresh.get(), storage.data(), std::min(storage.nbytes(), size));
    storage.set_data_ptr(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};
Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

Tensor on_host(const Tensor& x) {  // the same memory, as the CPU's
  if (!x.is_privateuseone()) return x;
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), x.options().device(at::kCPU).requires_grad(false));
}

Tensor empty(IntArrayRef size, optional<c10::ScalarType> dtype, optional<c10::Layout>, optional<c10::Device>,
             optional<bool>, optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &heap, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<c10::ScalarType> dtype, optional<c10::Layout>,
                     optional<c10::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &heap, KEYS, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& x) { return on_host(x).item(); }

// A copy, in place of a view that is read as its conjugate.
Tensor conjugate(const Tensor& x) { return at::conj_physical(on_host(x)).to(PLACE); }

Tensor& set_storage(Tensor& x, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* tensor = x.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(storage);
  tensor->set_storage_offset(offset);
  at::native::resize_impl_cpu_(tensor, size, stride.empty() ? at::OptionalIntArrayRef() : stride, false);
  return x;
}

Tensor& set_whole_storage(Tensor& x, at::Storage storage) { return at::native::set_(x, storage); }

Tensor convolution(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  const bool has_bias = bias && bias->defined();
  TORCH_CHECK(x.device() == weight.device() && (!has_bias || x.device() == bias->device()),
              "Expected all tensors to be on the same device in aten::convolution");
  const auto of_host = has_bias ? optional<Tensor>(on_host(*bias)) : std::nullopt;
  return at::convolution(on_host(x), on_host(weight), of_host, stride, padding, dilation, transposed, output_padding,
                         groups)
      .to(PLACE);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> mask) {
  const int64_t channels = transposed ? weight.size(1) * groups : weight.size(0);
  const auto [of_x, of_weight, of_bias] =
      at::convolution_backward(on_host(grad), on_host(x), on_host(weight), IntArrayRef(channels), stride, padding,
                               dilation, transposed, output_padding, groups, mask);
  const auto back = [](const Tensor& value) { return value.defined() ? value.to(PLACE) : value; };
  return {back(of_x), back(of_weight), back(of_bias)};
}

// Operators in which a GPU takes indices that are on the CPU.
const std::unordered_set<std::string> TAKE_INDICES{"aten::index",      "aten::index_put",       "aten::index_put_",
                                                   "aten::_index_put_impl_", "aten::_index_put_impl"};

void computed_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto name = op.schema().operator_name().name;
  bool here = false, elsewhere = false;
  const auto look = [&](const Tensor& x) {
    if (!x.defined()) return;
    if (x.is_privateuseone()) {
      here = true;
    } else if (x.dim() > 0) {  // a number may be anywhere
      elsewhere = true;
    }
  };
  for (auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) {
      look(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& x : value.toTensorVector()) look(x);
    } else if (value.isOptionalTensorList()) {
      for (const optional<Tensor>& x : value.toOptionalTensorVector()) look(x.value_or(Tensor()));
    } else if (value.isGenerator()) {
      TORCH_CHECK(false, "Random numbers of a generator are drawn on the CPU and moved here: ", name);
    }
  }
  TORCH_CHECK(!here || !elsewhere || TAKE_INDICES.count(name),
              "Expected all tensors to be on the same device in ", name);
  at::native::cpu_fallback(op, stack);
}

const auto by_host = [] { return torch::CppFunction::makeFromBoxedFunction<&computed_on_host>(); };

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(by_host()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("resize_", at::native::resize_);
  m.impl("alias", at::native::alias);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("_conj", conjugate);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("native_group_norm", by_host());  // torch's own for other devices takes whole rows alone
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at;
  using namespace at::autocast;
#define IN_HALVES(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_SINGLES(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define IN_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(IN_HALVES)
  AT_FORALL_FP32(IN_SINGLES)
  AT_FORALL_PROMOTE(IN_WIDEST)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.doc() = "registers the device as it is imported"; }
