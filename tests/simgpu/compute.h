// The operators that the device has of its own.
#pragma once
#include "transfers.h"

// ---- compute
// A CPU tensor on a device tensor's memory. It owns a share of the memory, not the tensor, so that a worker
// may drop it.
static Tensor host_alias(const Tensor& t) {
  if (!t.is_privateuseone()) return t;
  auto m = mem_of(t);
  return at::from_blob(
      t.data_ptr(), t.sizes(), t.strides(), [m](void*) {}, t.options().device(at::kCPU).requires_grad(false),
      at::kCPU);
}
// fn, then what the settings add to the time a compute op takes.
template <class F>
static void timed(F&& fn) {
  double t0 = now();
  fn();
  double dt = now() - t0, extra = G.cfg.op_seconds + (G.cfg.op_factor > 1 ? (G.cfg.op_factor - 1) * dt : 0);
  if (extra > 0) wait_until(t0 + dt + extra);
  Lock l(G.mu);
  G.compute_s += now() - t0;
}
struct Use {
  Tensor t;
  bool write;
};
// Runs fn, which reads and writes the given device tensors, as one operation of the current stream (fn must
// hold aliases only).
static void device_op(const std::string& name, const std::vector<Use>& uses, std::function<void()> fn,
                      Kind count = NKIND, size_t bytes = 0) {
  int64_t id = tl_stream;
  {
    Lock l(G.mu);
    auto& s = stream(id);
    tick(s);
    Job j;
    s.c.ops++;
    if (count != NKIND) {
      s.c.n[count]++;
      s.c.bytes[count] += bytes;
    }
    for (auto& u : uses)
      if (auto m = mem_of(u.t)) {
        auto [lo, hi] = span(u.t);
        if (lo < hi) {
          touch(*m, lo, hi, u.write, s, name);
          j.mems.push_back(m);
        }
      }
    if (is_async(s)) {
      s.c.deferred++;
      j.fn = [fn = std::move(fn)] {
        at::NoGradGuard ng;
        at::AutoDispatchBelowADInplaceOrView g;
        timed(fn);
      };
      enqueue(s, std::move(j));
      return;
    }
  }
  at::AutoDispatchBelowADInplaceOrView g;
  timed(fn);
}
// Before the host itself looks at device memory: whatever is queued on the current stream has to be done.
static void drain(bool host_knows) {
  int64_t id = tl_stream;
  NoGil n;
  Lock l(G.mu);
  auto& s = stream(id);
  uint64_t seq = s.submitted;
  host_wait(l, G.wait_s, [&] { return s.completed >= seq; }, s.idle_since);
  if (host_knows) {
    G.host.merge(s.vc);
    raise_error(l);
  }
}

static Tensor new_device(c10::IntArrayRef size, c10::IntArrayRef stride, at::ScalarType dt) {
  return at::detail::empty_strided_generic(size, stride, &dev_alloc,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dt);
}
static Tensor empty_mf(c10::SymIntArrayRef size, std::optional<at::ScalarType> dt, std::optional<at::Layout>,
                       std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> mf) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &dev_alloc,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dt.value_or(at::get_default_dtype_as_scalartype()), mf);
}
static Tensor empty_str(c10::SymIntArrayRef size, c10::SymIntArrayRef st, std::optional<at::ScalarType> dt,
                        std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return new_device(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(st),
                    dt.value_or(at::get_default_dtype_as_scalartype()));
}

static Tensor copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) {
  if (dst.numel() == 0) return dst;
  bool sd = self.is_privateuseone(), dd = dst.is_privateuseone();
  // inside at::native::cpu_fallback: part of a compute op, not a transfer
  if (tl_raw) {
    {
      Lock l(G.mu);
      auto& s = stream(tl_stream);
      for (auto& u : {Use{self, false}, Use{dst, true}})
        if (u.t.is_privateuseone())
          if (auto m = mem_of(u.t)) {
            auto [lo, hi] = span(u.t);
            if (lo < hi) touch(*m, lo, hi, u.write, s, "fallback");
          }
    }
    at::AutoDispatchBelowADInplaceOrView g;
    host_alias(dst).copy_(host_alias(self));
    return dst;
  }
  if (sd && dd) {
    Tensor a = host_alias(self), b = host_alias(dst);
    device_op("copy_", {{self, false}, {dst, true}}, [a, b]() mutable { b.copy_(a); }, D2D, dst.nbytes());
    return dst;
  }
  Tensor src = self.sizes() == dst.sizes() ? self : self.expand(dst.sizes());
  bool same_type = src.scalar_type() == dst.scalar_type();
  if (same_type && src.is_non_overlapping_and_dense() &&
      (src.strides() == dst.strides() || (src.is_contiguous() && dst.is_contiguous())) &&
      src.is_conj() == dst.is_conj() && src.is_neg() == dst.is_neg()) {
    transfer(src, dst, non_blocking);
    return dst;
  }
  // Temporaries, as at::native::copy_kernel_cuda: with non_blocking the device converts the type, without it
  // the CPU does.
  Tensor src_c, dst_c;
  auto cf = at::MemoryFormat::Contiguous;
  if (src.is_privateuseone() == non_blocking) {
    dst_c = dst.is_contiguous() ? dst : at::empty_like(dst, cf);
    src_c = src.to(dst.scalar_type()).contiguous();
  } else {
    dst_c = dst.is_contiguous() && same_type
                ? dst
                : at::empty_like(dst, dst.options().dtype(src.scalar_type()), cf);
    src_c = src.contiguous();
  }
  if (dd && !dst_c.is_same(dst)) static_cast<Block*>(dst_c.storage().data_ptr().get_context())->quiet = true;
  copy_from(src_c.resolve_conj().resolve_neg(), dst_c, non_blocking);
  if (!dst_c.is_same(dst)) {
    if (!dd) {
      at::AutoDispatchBelowADInplaceOrView g;
      if (non_blocking) drain(true);
      dst.copy_(dst_c);
    } else copy_from(dst_c, dst, non_blocking);
  }
  return dst;
}
static void resize_storage(const c10::Storage& s, size_t n) {
  drain(false);
  auto d = dev_alloc.allocate(n);
  if (s.data() && n) std::memcpy(d.get(), s.data(), std::min(n, s.nbytes()));
  s.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(d));
  s.unsafeGetStorageImpl()->set_nbytes(n);
}
static const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size,
                            std::optional<at::MemoryFormat> mf) {
  auto sz = C10_AS_INTARRAYREF_SLOW(size);
  auto* im = self.unsafeGetTensorImpl();
  size_t need = size_t(c10::multiply_integers(sz) + self.storage_offset()) * self.dtype().itemsize();
  if (need > self.storage().nbytes()) resize_storage(self.storage(), need);
  im->set_sizes_contiguous(sz);
  if (mf && *mf != at::MemoryFormat::Preserve) im->empty_tensor_restride(*mf);
  return self;
}
static Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  resize(dst, self.sym_sizes(), std::nullopt);
  return copy_from(self, dst, false);
}
static at::Scalar local_scalar(const Tensor& t) {
  {
    Lock l(G.mu);
    auto& s = stream(tl_stream);
    tick(s);
    if (auto m = mem_of(t)) {
      auto [lo, hi] = span(t);
      touch(*m, lo, hi, false, s, "item");
    }
  }
  drain(true);
  return at::_local_scalar_dense(host_alias(t));
}
static Tensor& fill(Tensor& t, const at::Scalar& v) {
  Tensor a = host_alias(t);
  device_op("fill_", {{t, true}}, [a, v]() mutable { a.fill_(v); });
  return t;
}
static Tensor& zero(Tensor& t) {
  Tensor a = host_alias(t);
  device_op("zero_", {{t, true}}, [a]() mutable { a.zero_(); });
  return t;
}
static Tensor as_strided(const Tensor& s, c10::SymIntArrayRef a, c10::SymIntArrayRef b,
                         std::optional<c10::SymInt> o) {
  return at::native::as_strided_tensorimpl(
      s, C10_AS_INTARRAYREF_SLOW(a), C10_AS_INTARRAYREF_SLOW(b),
      o ? std::optional<int64_t>(o->guard_int(__FILE__, __LINE__)) : std::nullopt);
}
static Tensor view(const Tensor& s, c10::SymIntArrayRef a) {
  return at::native::view(s, C10_AS_INTARRAYREF_SLOW(a));
}
static Tensor reshape_alias(const Tensor& s, c10::SymIntArrayRef a, c10::SymIntArrayRef b) {
  return at::native::_reshape_alias(s, C10_AS_INTARRAYREF_SLOW(a), C10_AS_INTARRAYREF_SLOW(b));
}
static Tensor& set_storage(Tensor& r, at::Storage src, c10::SymInt off, c10::SymIntArrayRef size,
                           c10::SymIntArrayRef stride) {
  auto sz = C10_AS_INTARRAYREF_SLOW(size);
  std::vector<int64_t> dflt(sz.size(), 1);
  for (int i = int(sz.size()) - 2; i >= 0; i--)
    dflt[size_t(i)] = dflt[size_t(i) + 1] * std::max<int64_t>(sz[size_t(i) + 1], 1);
  r.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(src));
  r.unsafeGetTensorImpl()->set_sizes_and_strides(
      sz, stride.size() || sz.empty() ? C10_AS_INTARRAYREF_SLOW(stride) : c10::IntArrayRef(dflt),
      off.guard_int(__FILE__, __LINE__));
  return r;
}
static void record_stream(Tensor& t, c10::Stream s) { DeviceAlloc::record(t.storage().data_ptr(), s.id()); }

// ---- random numbers: the device has a generator of its own, a CPU generator inside
struct SimGenerator final : c10::GeneratorImpl {
  at::Generator cpu;
  SimGenerator()
      : GeneratorImpl(DEV, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t s) override { cpu.set_current_seed(s); }
  void set_offset(uint64_t o) override { cpu.set_offset(o); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& s) override { cpu.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  SimGenerator* clone_impl() const override {
    auto* g = new SimGenerator;
    g->cpu = cpu.clone();
    return g;
  }
};
static const at::Generator& default_gen() {
  static auto& g = *new at::Generator(at::make_generator<SimGenerator>());
  return g;
}
