// A pretend CUDA device for the CPU build of PyTorch: its memory is host memory, its kernels are the CPU's.
//
// Every op that reaches the dispatch key CUDA is run by its CPU kernel on tensors that alias the same bytes, so that
// in-place results, out= arguments and views land where a GPU would put them. What a GPU would refuse (tensors of two
// devices) is refused; what would make the host wait is counted; what a CUDA graph would record is recorded.
#include <torch/extension.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <chrono>
#include <cstdlib>
#include <mutex>
#include <unordered_set>

namespace py = pybind11;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;
using c10::Stream;

namespace {

constexpr DeviceIndex MAX_DEVICES = 8;

DeviceIndex device_count() {
  static const DeviceIndex count = [] {
    const char* text = std::getenv("PRETEND_CUDA_DEVICES");
    return static_cast<DeviceIndex>(std::min(text ? std::atoi(text) : 2, int(MAX_DEVICES)));
  }();
  return count;
}

thread_local DeviceIndex current_device = 0;
thread_local int64_t current_stream[MAX_DEVICES] = {};
std::atomic<int64_t> next_stream{1};

// As a failed call of CUDA's runtime is reported.
void require(bool holds, int code, const std::string& message) {
  if (!holds)
    throw c10::AcceleratorError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, code, "CUDA error: " + message);
}

void check_device(DeviceIndex index) {
  require(index >= 0 && index < device_count(), 101, "invalid device ordinal");
}

// ---- Memory -------------------------------------------------------------------------------------------------------

struct Stats {
  std::atomic<int64_t> current{0}, peak{0}, blocks{0};
};
Stats stats[MAX_DEVICES];

// What keeps a device storage's bytes: the CPU storage in which the CPU kernel left them.
struct Block {
  c10::Storage host;
  int64_t nbytes;
  DeviceIndex index;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  stats[block->index].current -= block->nbytes;
  stats[block->index].blocks -= 1;
  delete block;
}

c10::DataPtr on_device(const c10::Storage& host, DeviceIndex index) {
  auto nbytes = static_cast<int64_t>((host.nbytes() + 511) / 512 * 512);
  auto& of_device = stats[index];
  int64_t now = of_device.current += nbytes;
  of_device.blocks += 1;
  for (int64_t peak = of_device.peak; peak < now && !of_device.peak.compare_exchange_weak(peak, now);) {
  }
  return {host.mutable_data(), new Block{host, nbytes, index}, &release, Device(DeviceType::CUDA, index)};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    c10::Storage host(c10::Storage::use_byte_size_t(), n, at::getCPUAllocator()->allocate(n), nullptr, false);
    return on_device(host, current_device);
  }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
DeviceAllocator device_allocator;
REGISTER_ALLOCATOR(DeviceType::CUDA, &device_allocator)

// Page-locked memory: the CPU's, remembered.
std::mutex pinned_lock;
std::map<const char*, size_t> pinned;

struct PinnedAllocator final : c10::Allocator {
  static void unpin(void* context) {
    auto* memory = static_cast<c10::DataPtr*>(context);
    {
      std::lock_guard<std::mutex> hold(pinned_lock);
      pinned.erase(static_cast<const char*>(memory->get()));
    }
    delete memory;
  }
  c10::DataPtr allocate(size_t n) override {
    auto* memory = new c10::DataPtr(at::getCPUAllocator()->allocate(n));
    std::lock_guard<std::mutex> hold(pinned_lock);
    pinned[static_cast<const char*>(memory->get())] = n;
    return {memory->get(), memory, &unpin, Device(DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> hold(pinned_lock);
  auto found = pinned.upper_bound(static_cast<const char*>(address));
  return found != pinned.begin() && (--found, static_cast<const char*>(address) < found->first + found->second);
}

// ---- Syncs and graphs ---------------------------------------------------------------------------------------------

std::atomic<int> sync_debug_mode{0};  // of torch.cuda.set_sync_debug_mode: 1 warns, 2 is an error
std::atomic<bool> watching{false};
std::function<void(const std::string&, const std::string&)> on_sync;  // kind, op; called with the GIL

struct Graph {
  std::vector<std::function<void()>> steps;
  Stream stream{Stream::DEFAULT, Device(DeviceType::CUDA, 0)};
};
std::mutex graph_lock;
std::shared_ptr<Graph> capturing;

std::shared_ptr<Graph> graph_of_this_launch() {
  std::lock_guard<std::mutex> hold(graph_lock);
  if (capturing) {
    auto device = capturing->stream.device();
    require(
        current_stream[device.index()] == capturing->stream.id(), 906,
        "operation would make the legacy stream depend on a capturing blocking stream");
  }
  return capturing;
}

void host_waits(const std::string& kind, const std::string& op) {
  {
    std::lock_guard<std::mutex> hold(graph_lock);
    require(!capturing, 900, "operation not permitted when stream is capturing (" + kind + ", " + op + ")");
  }
  if (sync_debug_mode && kind != "synchronize") {
    TORCH_CHECK(sync_debug_mode == 1, "called a synchronizing CUDA operation");
    TORCH_WARN("called a synchronizing CUDA operation");
  }
  if (watching) {
    py::gil_scoped_acquire gil;
    if (on_sync)
      on_sync(kind, op);
  }
}

// ---- Streams, events, the current device --------------------------------------------------------------------------

struct Moment {
  std::chrono::steady_clock::time_point at;
};

struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override {
    Device before = getDevice();
    setDevice(d);
    return before;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current_device); }
  void setDevice(Device d) const override {
    check_device(d.index());
    current_device = d.index();
  }
  void uncheckedSetDevice(Device d) const noexcept override { current_device = d.index(); }
  static Stream stream(int64_t id, Device d) {
    DeviceIndex index = d.index() < 0 ? current_device : d.index();
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, index), id);
  }
  Stream getStream(Device d) const override {
    return stream(current_stream[d.index() < 0 ? current_device : d.index()], d);
  }
  Stream getDefaultStream(Device d) const override { return stream(0, d); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return stream(next_stream++, d); }
  Stream getNewStream(Device d, int) const override { return stream(next_stream++, d); }
  Stream exchangeStream(Stream s) const override {
    Stream before = getStream(s.device());
    current_stream[s.device_index()] = s.id();
    return before;
  }
  void* getStreamNativeHandle(const Stream s) const override { return reinterpret_cast<void*>(s.id()); }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Moment*>(event); }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (!*event)
      *event = new Moment;
    static_cast<Moment*>(*event)->at = std::chrono::steady_clock::now();
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { host_waits("synchronize", "stream"); }
  bool isStreamCapturing(const Stream& s) const override {
    std::lock_guard<std::mutex> hold(graph_lock);
    return capturing && capturing->stream == s;
  }
  void synchronizeEvent(void*) const override { host_waits("synchronize", "event"); }
  void synchronizeDevice(const DeviceIndex) const override { host_waits("synchronize", "device"); }
  double elapsedTime(void* a, void* b, const DeviceIndex) const override {
    return std::chrono::duration<double, std::milli>(static_cast<Moment*>(b)->at - static_cast<Moment*>(a)->at).count();
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, GuardImpl)
GuardImpl guard;

// ---- Random numbers: a CPU generator of its own for each device ----------------------------------------------------

struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator host;
  explicit DeviceGenerator(DeviceIndex index, at::Generator g = at::detail::createCPUGenerator())
      : GeneratorImpl(Device(DeviceType::CUDA, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)), host(std::move(g)) {}
  // A GPU draws other numbers than the CPU from the same seed; PRETEND_CUDA_SEED chooses which.
  void set_current_seed(uint64_t seed) override {
    static const char* other = std::getenv("PRETEND_CUDA_SEED");
    host.set_current_seed(other ? seed + 1000003 * std::strtoull(other, nullptr, 10) : seed);
  }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return const_cast<at::Generator&>(host).seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new DeviceGenerator(device_.index(), host.clone()); }
};

const at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator>* all = [] {
    auto* made = new std::vector<at::Generator>;
    for (DeviceIndex i = 0; i < MAX_DEVICES; ++i)
      made->push_back(at::make_generator<DeviceGenerator>(i));
    return made;
  }();
  index = index < 0 ? current_device : index;
  check_device(index);
  return (*all)[index];
}

}  // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  const Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  Generator getNewGenerator(DeviceIndex index) const override {
    return make_generator<DeviceGenerator>(index < 0 ? ::current_device : index);
  }
  Device getDeviceFromPtr(void*) const override { return Device(DeviceType::CUDA, ::current_device); }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex deviceCount() const override { return device_count(); }
  int getNumGPUs() const override { return device_count(); }
  void setCurrentDevice(DeviceIndex d) const override { guard.setDevice(Device(DeviceType::CUDA, d)); }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override {
    return guard.exchangeDevice(Device(DeviceType::CUDA, d)).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return d < 0 ? -1 : exchangeDevice(d); }
  void deviceSynchronize(DeviceIndex) const override { host_waits("synchronize", "device"); }
  std::string showConfig() const override { return "pretend CUDA"; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace {

// ---- One op: device tensors in, their CPU aliases through the CPU kernel, device tensors out ------------------------

std::unordered_set<std::string> unchecked;  // ops whose generated code leaves the check of devices to TensorIterator

bool on_cuda(const at::Tensor& x) { return x.defined() && x.device().type() == DeviceType::CUDA; }

void hold_storage(void* context) { delete static_cast<c10::Storage*>(context); }

struct Call {
  struct Bytes {
    c10::Storage device, host;
    const void* data;
    size_t nbytes;
  };
  struct Argument {
    at::Tensor device, host;
    bool written;
  };
  std::vector<Bytes> storages;
  std::vector<Argument> arguments;
  std::vector<at::Tensor> host_tensors;  // CPU tensors among the arguments
  bool writes_host = false;
  Device device{DeviceType::CPU};

  c10::Storage host_storage(const c10::Storage& storage) {
    for (auto& known : storages)
      if (known.device.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl())
        return known.host;
    c10::DataPtr alias(storage.mutable_data(), new c10::Storage(storage), &hold_storage, Device(DeviceType::CPU));
    c10::Storage host(
        c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(alias), at::getCPUAllocator(), true);
    storages.push_back({storage, host, host.data(), host.nbytes()});
    return host;
  }

  at::Tensor to_host(const at::Tensor& x, bool written = false) {
    if (!on_cuda(x)) {
      if (x.defined() && x.device().is_cpu()) {
        host_tensors.push_back(x);
        writes_host |= written;
      }
      return x;
    }
    TORCH_CHECK(x.layout() == c10::kStrided, "the pretend device has strided tensors only");
    if (!device.is_cuda())
      device = x.device();
    for (auto& known : arguments)
      if (known.device.is_same(x)) {
        known.written |= written;
        return known.host;
      }
    auto impl = c10::make_intrusive<c10::TensorImpl>(
        host_storage(x.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), x.dtype());
    impl->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
    impl->_set_neg(x.is_neg());
    impl->_set_conj(x.is_conj());
    if (x.unsafeGetTensorImpl()->is_wrapped_number())
      impl->set_wrapped_number(true);
    at::Tensor host(std::move(impl));
    arguments.push_back({x, host, written});
    return host;
  }

  c10::Storage device_storage(const c10::Storage& storage) {
    for (auto& known : storages)
      if (known.host.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl())
        return known.device;
    c10::Storage made(
        c10::Storage::use_byte_size_t(), storage.nbytes(), on_device(storage, device.index()), &device_allocator, true);
    storages.push_back({made, storage, storage.data(), storage.nbytes()});
    return made;
  }

  at::Tensor to_device(const at::Tensor& x) {
    if (!x.defined() || !x.device().is_cpu())
      return x;
    for (auto& known : arguments)
      if (known.host.is_same(x))
        return known.device;
    for (auto& host : host_tensors)
      if (host.is_same(x))
        return x;
    c10::Storage storage = device_storage(x.storage());
    c10::intrusive_ptr<c10::TensorImpl> impl;
    for (auto& known : arguments)  // a view is an inference tensor where its base is one
      if (!impl && known.device.storage().unsafeGetStorageImpl() == storage.unsafeGetStorageImpl())
        impl = c10::make_intrusive<c10::TensorImpl>(
            c10::TensorImpl::VIEW, c10::Storage(storage), known.device.key_set(), x.dtype());
    if (!impl)
      impl = c10::make_intrusive<c10::TensorImpl>(
          std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), x.dtype());
    impl->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
    impl->_set_neg(x.is_neg());
    impl->_set_conj(x.is_conj());
    if (x.unsafeGetTensorImpl()->is_wrapped_number())
      impl->set_wrapped_number(true);
    return at::Tensor(std::move(impl));
  }

  IValue to_host(const IValue& x, bool written) {
    if (x.isTensor())
      return to_host(x.toTensor(), written);
    if (x.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& each : x.toTensorVector())
        list.push_back(to_host(each, written));
      return list;
    }
    if (x.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& each : x.toOptionalTensorVector())
        list.push_back(each ? std::optional<at::Tensor>(to_host(*each, written)) : std::nullopt);
      return list;
    }
    if (x.isDevice() && x.toDevice().is_cuda()) {
      if (!device.is_cuda())
        device = Device(DeviceType::CUDA, x.toDevice().has_index() ? x.toDevice().index() : current_device);
      return Device(DeviceType::CPU);
    }
    if (x.isStorage() && x.toStorage().device().is_cuda()) {
      if (!device.is_cuda())
        device = x.toStorage().device();
      return host_storage(x.toStorage());
    }
    if (x.isGenerator()) {
      auto* generator = dynamic_cast<DeviceGenerator*>(x.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(generator, "Expected a 'cuda' device type for generator but found '", x.toGenerator().device(), "'");
      return generator->host;
    }
    return x;
  }

  IValue to_device(const IValue& x) {
    if (x.isTensor())
      return to_device(x.toTensor());
    if (x.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& each : x.toTensorVector())
        list.push_back(to_device(each));
      return list;
    }
    return x;
  }

  // resize_, set_ and out= may have given an argument another shape or other memory.
  void update_written() {
    for (auto& known : storages)
      if (known.host.data() != known.data || known.host.nbytes() != known.nbytes) {
        known.device.set_data_ptr_noswap(on_device(known.host, device.index()));
        known.device.set_nbytes(known.host.nbytes());
      }
    for (auto& argument : arguments) {
      if (!argument.written)
        continue;
      auto* to = argument.device.unsafeGetTensorImpl();
      const auto& from = argument.host;
      c10::Storage storage = device_storage(from.storage());
      if (storage.unsafeGetStorageImpl() != to->storage().unsafeGetStorageImpl())
        to->set_storage_keep_dtype(storage);
      if (to->sizes() != from.sizes() || to->strides() != from.strides() || to->storage_offset() != from.storage_offset())
        to->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
    }
  }
};

bool starts_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }

void check_devices(const Call& call, const std::string& name) {
  const bool copy = name == "aten::copy_" || name == "aten::_copy_from" || starts_with(name, "aten::set_");
  if (copy)
    return;
  auto fail = [&](Device other) {
    TORCH_CHECK(
        false,
        "Expected all tensors to be on the same device, but found at least two devices, ",
        call.device, " and ", other, "! (", name, ")");
  };
  for (auto& argument : call.arguments)
    if (argument.device.device() != call.device)
      fail(argument.device.device());
  if (call.arguments.empty() || call.host_tensors.empty())
    return;
  if (call.writes_host)
    fail(Device(DeviceType::CPU));
  const bool indexes = starts_with(name, "aten::index") || starts_with(name, "aten::_index_put") ||
      starts_with(name, "aten::_unsafe_index");
  int scalars = 0;
  for (auto& x : call.host_tensors) {
    if (!unchecked.count(name))
      fail(Device(DeviceType::CPU));
    if (indexes && (x.scalar_type() == at::kLong || x.scalar_type() == at::kBool || x.scalar_type() == at::kInt))
      continue;
    if (x.dim() != 0 || ++scalars > 1)
      fail(Device(DeviceType::CPU));
  }
}

const std::unordered_set<std::string> WAITS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::is_nonzero"};

void watch_syncs(const Call& call, const std::string& name, const std::vector<IValue>& stack, size_t first) {
  if (WAITS.count(name)) {
    host_waits("read", name);
  } else if (name == "aten::copy_") {
    const at::Tensor &to = stack[first].toTensor(), &from = stack[first + 1].toTensor();
    if (on_cuda(to) == on_cuda(from) || to.numel() == 0)
      return;
    const bool non_blocking = stack[first + 2].toBool();
    const bool page_locked = is_pinned((on_cuda(to) ? from : to).const_data_ptr());
    if (!non_blocking || !page_locked) {
      // Pageable memory cannot be captured, and is waited for unless non_blocking.
      if (!non_blocking)
        host_waits(on_cuda(to) ? "host to device" : "device to host", name);
      else if (graph_of_this_launch())
        host_waits("pageable memory", name);
    }
  } else if (name == "aten::repeat_interleave" && stack[first + 1].isNone() && stack.size() - first == 2) {
    host_waits("read", name);
  } else if (starts_with(name, "aten::index") || starts_with(name, "aten::_index_put")) {
    for (size_t i = first; i < stack.size(); ++i) {
      if (!stack[i].isOptionalTensorList())
        continue;
      for (const std::optional<at::Tensor>& each : stack[i].toOptionalTensorVector()) {
        if (!each || !each->defined())
          continue;
        const bool flags = each->scalar_type() == at::kBool || each->scalar_type() == at::kByte;
        const bool put = i + 1 < stack.size() && stack[i + 1].isTensor();
        const bool filled = put && stack[i + 1].toTensor().numel() == 1 && !stack[i + 2].toBool();
        if (flags && on_cuda(*each) && !filled)
          host_waits("read", name + " of flags");
        else if (!on_cuda(*each) && !filled)
          host_waits("host to device", name + " of an index");
      }
    }
  }
}

void check_dtypes(const Call& call, const std::string& name) {
  static const std::unordered_set<std::string> products = {
      "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addmv", "aten::dot", "aten::mv"};
  if (products.count(name))
    for (auto& argument : call.arguments)
      TORCH_CHECK_NOT_IMPLEMENTED(
          !c10::isIntegralType(argument.device.scalar_type(), true),
          '"', name.substr(6), "_cuda\" not implemented for '", argument.device.scalar_type(), "'");
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const auto& parameters = schema.arguments();
  const size_t first = stack->size() - parameters.size();
  Call call;
  std::vector<IValue> host(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto* alias = parameters[i].alias_info();
    host[i] = call.to_host((*stack)[first + i], alias && alias->isWrite());
  }
  TORCH_CHECK(call.device.is_cuda(), name, " came to the pretend device without a tensor or a device of it");
  for (size_t i = 0; i < parameters.size(); ++i)
    if (host[i].isNone() && parameters[i].type()->str().find("Generator") != std::string::npos)
      host[i] = static_cast<DeviceGenerator*>(default_generator(call.device.index()).unsafeGetGeneratorImpl())->host;
  check_devices(call, name);
  check_dtypes(call, name);
  watch_syncs(call, name, *stack, first);
  auto graph = graph_of_this_launch();

  torch::jit::Stack results(host);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &results);
  }
  call.update_written();
  if (graph && !starts_with(name, "aten::empty") && !starts_with(name, "aten::new_empty")) {
    bool computes = false;
    std::vector<at::Tensor> kept;
    for (auto& argument : call.arguments)
      computes |= argument.written;
    for (auto& result : results)
      for (auto& x : result.isTensorList() ? result.toTensorVector()
                                           : result.isTensor() ? std::vector<at::Tensor>{result.toTensor()}
                                                               : std::vector<at::Tensor>{})
        kept.push_back(x);
    for (auto& x : kept) {
      bool view = false;
      if (x.defined())
        for (auto& argument : call.arguments)
          view |= argument.host.storage().unsafeGetStorageImpl() == x.storage().unsafeGetStorageImpl();
      computes |= x.defined() && !view;
    }
    if (computes) {
      auto step = [op, host, kept] {
        at::AutoDispatchBelowADInplaceOrView below;
        torch::jit::Stack again(host);
        op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &again);
        size_t i = 0;
        for (auto& result : again)
          for (auto& x : result.isTensorList() ? result.toTensorVector()
                                               : result.isTensor() ? std::vector<at::Tensor>{result.toTensor()}
                                                                   : std::vector<at::Tensor>{}) {
            const auto& to = kept[i++];
            if (x.defined() && x.const_data_ptr() != to.const_data_ptr())
              to.copy_(x);
          }
      };
      std::lock_guard<std::mutex> hold(graph_lock);
      graph->steps.push_back(step);
    }
  }
  torch::jit::drop(*stack, parameters.size());
  for (auto& result : results)
    stack->push_back(call.to_device(result));
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { run(op, stack); }

void record_stream(at::Tensor&, c10::Stream) {}

// CUDA's softmax widens half precision as it reads; the CPU's has no such mode.
template <bool LOG>
at::Tensor softmax(const at::Tensor& x, int64_t dim, bool half_to_float) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow(LOG ? "aten::_log_softmax" : "aten::_softmax", "");
  torch::jit::Stack stack{half_to_float ? x.to(at::kFloat) : x, dim, false};
  run(op, &stack);
  return stack[0].toTensor();
}

template <bool LOG>
at::Tensor softmax_backward(const at::Tensor& grad, const at::Tensor& out, int64_t dim, at::ScalarType dtype) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow(
      LOG ? "aten::_log_softmax_backward_data" : "aten::_softmax_backward_data", "");
  torch::jit::Stack stack{grad, out, dim, grad.scalar_type()};
  run(op, &stack);
  return stack[0].toTensor().to(dtype);
}

int64_t plain_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// Composite kernels that would choose among CUDA's own: the CPU's choice is as good.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  for (const char* name : {"copy_", "convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("record_stream", &record_stream);
  m.impl("_softmax", &softmax<false>);
  m.impl("_log_softmax", &softmax<true>);
  m.impl("_softmax_backward_data", &softmax_backward<false>);
  m.impl("_log_softmax_backward_data", &softmax_backward<true>);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&plain_attention);
  m.def("device_count", &device_count);
  m.def("get_device", [] { return int(current_device); });
  m.def("set_device", [](int d) {
    if (d >= 0)
      guard.setDevice(Device(DeviceType::CUDA, DeviceIndex(d)));
  });
  m.def("exchange_device", [](int d) {
    int before = current_device;
    if (d < 0)
      return -1;
    guard.setDevice(Device(DeviceType::CUDA, DeviceIndex(d)));
    return before;
  });
  m.def("get_stream", [](int d) { return guard.getStream(Device(DeviceType::CUDA, DeviceIndex(d))).id(); });
  m.def("set_stream", [](int64_t id, int d) {
    guard.exchangeStream(GuardImpl::stream(id, Device(DeviceType::CUDA, DeviceIndex(d))));
    current_device = DeviceIndex(d);
  });
  m.def("new_stream", [] { return next_stream++; });
  m.def("host_waits", [](const std::string& kind, const std::string& op) {
    py::gil_scoped_release free;
    host_waits(kind, op);
  });
  m.def("set_sync_debug_mode", [](int mode) { sync_debug_mode = mode; });
  m.def("get_sync_debug_mode", [] { return sync_debug_mode.load(); });
  m.def("watch", [](std::optional<py::function> callback) {
    watching = callback.has_value();
    on_sync = callback ? [f = *callback](const std::string& k, const std::string& o) { f(k, o); }
                       : std::function<void(const std::string&, const std::string&)>();
  });
  m.def("memory", [](int d) { return std::make_tuple(stats[d].current.load(), stats[d].peak.load(), stats[d].blocks.load()); });
  m.def("reset_peak", [](int d) { stats[d].peak = stats[d].current.load(); });
  m.def("default_generator", [](int d) { return default_generator(DeviceIndex(d)); });
  m.def("unchecked", [](const std::vector<std::string>& names) { unchecked.insert(names.begin(), names.end()); });
  m.def("host_alias", [](const at::Tensor& x) {
    Call call;
    return call.to_host(x);
  });
  m.def("check_launch", [] { graph_of_this_launch(); });
  py::class_<Graph, std::shared_ptr<Graph>>(m, "Graph")
      .def("replay", [](const std::shared_ptr<Graph>& graph) {
        py::gil_scoped_release free;
        for (auto& step : graph->steps)
          step();
      })
      .def("clear", [](Graph& graph) { graph.steps.clear(); })
      .def_property_readonly("launches", [](const Graph& graph) { return graph.steps.size(); });
  m.def("capture_begin", [] {
    auto graph = std::make_shared<Graph>();
    graph->stream = guard.getStream(guard.getDevice());
    TORCH_CHECK(graph->stream.id() != 0, "CUDA graphs must be captured on a non-default stream. (However, after capture, "
        "it's ok to replay them on the default stream.)");
    std::lock_guard<std::mutex> hold(graph_lock);
    capturing = graph;
  });
  m.def("capture_end", [] {
    std::lock_guard<std::mutex> hold(graph_lock);
    auto graph = capturing;
    capturing.reset();
    return graph;
  });
  m.def("is_capturing", [] { std::lock_guard<std::mutex> hold(graph_lock); return bool(capturing); });
  m.def("record", [](py::function f) {  // a launch that the dispatcher does not see
    std::lock_guard<std::mutex> hold(graph_lock);
    if (!capturing)
      return;
    auto* kept = new py::function(std::move(f));
    std::shared_ptr<py::function> shared(kept, [](py::function* p) {
      py::gil_scoped_acquire gil;
      delete p;
    });
    capturing->steps.push_back([shared] {
      py::gil_scoped_acquire gil;
      (*shared)();
    });
  });
}
