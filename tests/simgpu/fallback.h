// Every other operator: the CPU kernels, run on aliases of device memory.
#pragma once
#include "elementwise.h"

// ---- every other operator
static bool is_write(const c10::Argument& a) { return a.alias_info() && a.alias_info()->isWrite(); }
// The arguments for the CPU kernel: aliases of device tensors, CPU in place of the device, the CPU generator
// inside the device's one. copy_cpu: CPU tensors are cloned, so that a worker can own them (the originals may
// belong to Python).
static torch::jit::Stack cpu_args(const c10::FunctionSchema& sc, c10::ArrayRef<IValue> args, bool copy_cpu) {
  torch::jit::Stack out;
  for (size_t i = 0; i < args.size(); i++) {
    const IValue& v = args[i];
    bool gen_arg = sc.arguments()[i].name() == "generator";
    if (v.isDevice() && v.toDevice().type() == PU) out.emplace_back(c10::Device(c10::DeviceType::CPU));
    else if (gen_arg && v.isNone())
      out.emplace_back(static_cast<SimGenerator*>(default_gen().unsafeGetGeneratorImpl())->cpu);
    else if (v.isGenerator() && v.toGenerator().device().type() == PU)
      out.emplace_back(static_cast<SimGenerator*>(v.toGenerator().unsafeGetGeneratorImpl())->cpu);
    else
      out.push_back(map_tensors(v, [&](const Tensor& t) {
        if (t.is_privateuseone() || !copy_cpu) return host_alias(t);
        Tensor c = t.clone();
        if (t.unsafeGetTensorImpl()->is_wrapped_number()) c.unsafeGetTensorImpl()->set_wrapped_number(true);
        return c;
      }));
  }
  return out;
}
static void call_cpu(const c10::OperatorHandle& op, torch::jit::Stack* st) {
  if (!run_in_pieces(op, st)) run_kernel(op, st);
}

static const std::unordered_set<std::string> MIXED = {"aten::index.Tensor", "aten::_index_put_impl_",
                                                      "aten::index_put_", "aten::_unsafe_index.Tensor",
                                                      "aten::index.Tensor_out"};
static std::vector<Use> uses_of(const c10::OperatorHandle& op, c10::ArrayRef<IValue> args, bool check) {
  std::vector<Use> u;
  const auto& sc = op.schema();
  bool mixed = false, device = false;
  for (size_t i = 0; i < args.size(); i++) {
    bool w = is_write(sc.arguments()[i]);
    map_tensors(args[i], [&](const Tensor& t) {
      if (t.is_privateuseone()) {
        u.push_back({t, w});
        device = true;
      } else if (t.dim() > 0 && t.device().is_cpu()) mixed = true;
      return t;
    });
  }
  if (check && G.cfg.strict && device && mixed)
    TORCH_CHECK(MIXED.count(toString(op.operator_name())),
                "Expected all tensors to be on the same device, but found at least two devices, simgpu:0 and "
                "cpu! (when checking arguments of ",
                toString(op.operator_name()), ")");
  return u;
}
// Which argument a result is (in-place operators), or -1.
static int result_arg(const c10::FunctionSchema& sc, size_t r) {
  auto* ra = sc.returns()[r].alias_info();
  if (!ra || !ra->isWrite()) return -1;
  for (size_t i = 0; i < sc.arguments().size(); i++) {
    auto* a = sc.arguments()[i].alias_info();
    if (a && a->isWrite() && a->beforeSets() == ra->beforeSets()) return int(i);
  }
  return -1;
}

// Queues the operator on an asynchronous stream, with the result shapes that its meta kernel gives. False: it
// cannot be queued.
static bool try_defer(const c10::OperatorHandle& op, torch::jit::Stack* stack, bool out_variant) {
  const auto& sc = op.schema();
  std::string name = toString(op.operator_name());
  size_t na = sc.arguments().size();
  // given up
  {
    Lock l(G.mu);
    auto it = G.not_deferred.find(name);
    if (it != G.not_deferred.end() && it->second.first >= 5) return false;
  }
  bool fresh = false;
  for (size_t r = 0; r < sc.returns().size(); r++) {
    bool a = sc.returns()[r].alias_info() != nullptr;
    if (sc.returns()[r].type()->kind() != c10::TypeKind::TensorType || (a && result_arg(sc, r) < 0))
      return false;
    fresh = fresh || !a;
  }
  auto args = torch::jit::last(*stack, na);
  for (const auto& v : args) {
    bool big = false;
    map_tensors(v, [&](const Tensor& t) {
      if (!t.is_privateuseone() && t.numel() > 4096) big = true;
      return t;
    });
    if (big) return false;
  }
  auto uses = uses_of(op, args, true);
  torch::jit::Stack meta;
  // (out= arguments: to see whether they would be resized)
  if (fresh || out_variant) {
    for (const auto& v : args) {
      if (v.isDevice()) meta.emplace_back(c10::Device(c10::DeviceType::Meta));
      else if (v.isGenerator()) meta.emplace_back();
      else
        meta.push_back(map_tensors(v, [](const Tensor& t) {
          return t.is_privateuseone() ? at::empty_strided(t.sizes(), t.strides(),
                                                          t.options().device(at::kMeta).requires_grad(false))
                                      : t;
        }));
    }
    try {
      at::AutoDispatchBelowADInplaceOrView g;
      op.callBoxed(&meta);
    } catch (const std::exception& e) {
      Lock l(G.mu);
      auto& f = G.not_deferred[name];
      f.first++;
      f.second = e.what();
      return false;
    }
  }
  std::vector<Tensor> results, targets;
  for (size_t r = 0; r < sc.returns().size(); r++) {
    int a = result_arg(sc, r);
    if (a >= 0 && out_variant && meta[r].toTensor().sizes() != args[size_t(a)].toTensor().sizes())
      return false;
    if (a >= 0) {
      results.push_back(args[size_t(a)].toTensor());
      targets.emplace_back();
      continue;
    }
    const Tensor& m = meta[r].toTensor();
    if (!m.defined()) {
      results.emplace_back();
      targets.emplace_back();
      continue;
    }
    Tensor t = new_device(m.sizes(), m.strides(), m.scalar_type());
    results.push_back(t);
    targets.push_back(host_alias(t));
    uses.push_back({t, true});
  }
  auto ca = cpu_args(sc, args, true);
  device_op(name, uses, [op, ca, targets]() mutable {
    torch::jit::Stack st = ca;
    call_cpu(op, &st);
    for (size_t r = 0; r < targets.size(); r++)
      if (targets[r].defined()) targets[r].copy_(st[r].toTensor());
  });
  torch::jit::drop(*stack, na);
  for (auto& t : results) stack->emplace_back(t);
  return true;
}

static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& sc = op.schema();
  size_t na = sc.arguments().size();
  std::string name = toString(op.operator_name());
  bool out_variant = false;
  for (auto& a : sc.arguments()) out_variant = out_variant || (is_write(a) && a.kwarg_only());
  bool async;
  {
    Lock l(G.mu);
    async = is_async(stream(tl_stream));
  }
  if (async) {
    if (try_defer(op, stack, out_variant)) return;
    drain(false);
    Lock l(G.mu);
    stream(tl_stream).c.drained++;
  }
  // PyTorch's own fallback: copies in and out, can resize out= arguments
  auto copying = [&] {
    struct Raw {
      Raw() { tl_raw++; }
      ~Raw() { tl_raw--; }
    } raw;
    timed([&] { at::native::cpu_fallback(op, stack); });
  };
  std::vector<IValue> args;
  for (auto& v : torch::jit::last(*stack, na)) args.push_back(v);
  auto uses = uses_of(op, args, true);
  {
    Lock l(G.mu);
    auto& s = stream(tl_stream);
    tick(s);
    s.c.ops++;
    for (auto& u : uses)
      if (auto m = mem_of(u.t)) {
        auto [lo, hi] = span(u.t);
        if (lo < hi) touch(*m, lo, hi, u.write, s, name);
      }
  }
  torch::jit::Stack st = cpu_args(sc, args, false);
  if (out_variant) {
    bool empty = false;
    for (size_t i = 0; i < na; i++)
      if (is_write(sc.arguments()[i]))
        map_tensors(args[i], [&](const Tensor& t) {
          empty = empty || t.numel() == 0;
          return t;
        });
    if (empty) {
      copying();
      return;
    }
  }
  at::AutoDispatchBelowADInplaceOrView g;
  // an alias cannot grow: if the kernel wants that, or shrinks it, PyTorch's way is taken
  if (out_variant) {
    auto al = st;
    bool resized = false;
    try {
      timed([&] { call_cpu(op, &st); });
    } catch (const c10::Error& e) {
      if (std::string(e.what()).find("resiz") == std::string::npos) throw;
      resized = true;
    }
    for (size_t i = 0; i < na && !resized; i++)
      if (is_write(sc.arguments()[i]) && args[i].isTensor())
        resized = al[i].toTensor().sizes() != args[i].toTensor().sizes();
    if (resized) {
      copying();
      return;
    }
  } else timed([&] { call_cpu(op, &st); });
  torch::jit::drop(*stack, na);
  auto to_device = [&](const Tensor& r) -> Tensor {
    if (!r.device().is_cpu()) return r;
    auto p = reinterpret_cast<uintptr_t>(r.numel() ? r.data_ptr() : nullptr);
    // a view of a device tensor
    for (auto& u : uses) {
      auto [lo, hi] = span(u.t);
      if (p && p >= lo && p < hi)
        return at::native::as_strided_tensorimpl(
            u.t, r.sizes(), r.strides(),
            u.t.storage_offset() +
                int64_t((p - reinterpret_cast<uintptr_t>(u.t.data_ptr())) / r.element_size()));
    }
    bool dense = r.is_non_overlapping_and_dense();
    Tensor o = dense ? new_device(r.sizes(), r.strides(), r.scalar_type())
                     : at::detail::empty_generic(r.sizes(), &dev_alloc,
                                                 c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                                 r.scalar_type(), std::nullopt);
    if (r.numel()) {
      if (dense) std::memcpy(o.data_ptr(), r.data_ptr(), r.nbytes());
      else host_alias(o).copy_(r);
    }
    if (auto m = mem_of(o)) {
      Lock l(G.mu);
      auto [lo, hi] = span(o);
      if (lo < hi) touch(*m, lo, hi, true, stream(tl_stream), name);
    }
    return o;
  };
  for (size_t r = 0; r < sc.returns().size(); r++) {
    int a = result_arg(sc, r);
    if (a >= 0) stack->push_back(args[size_t(a)]);
    else stack->push_back(map_tensors(st[r], to_device));
  }
  if (async) {
    Lock l(G.mu);
    for (auto& v : st)
      if (!v.isTensor() && !v.isTensorList()) {
        G.host.merge(stream(tl_stream).vc);
        break;
      }
  }
}
static Tensor conv(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, c10::SymIntArrayRef st,
                   c10::SymIntArrayRef pad, c10::SymIntArrayRef dil, bool tr, c10::SymIntArrayRef op,
                   c10::SymInt g) {
  static auto handle = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  torch::jit::Stack s;
  auto ints = [](c10::SymIntArrayRef a) {
    auto v = C10_AS_INTARRAYREF_SLOW(a);
    return IValue(v.vec());
  };
  s.emplace_back(x);
  s.emplace_back(w);
  if (b && b->defined()) s.emplace_back(*b);
  else s.emplace_back();
  s.push_back(ints(st));
  s.push_back(ints(pad));
  s.push_back(ints(dil));
  s.emplace_back(tr);
  s.push_back(ints(op));
  s.emplace_back(g.guard_int(__FILE__, __LINE__));
  fallback(handle, &s);
  return s.back().toTensor();
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty_mf);
  m.impl("empty_strided", empty_str);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize);
  m.impl("fill_.Scalar", fill);
  m.impl("zero_", zero);
  m.impl("record_stream", record_stream);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("convolution_overrideable", conv);
  // these would be taken apart into smaller operators; the CPU has whole kernels for them
  for (const char* n : {"native_layer_norm", "native_group_norm"})
    m.impl(n, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// simgpu.busy(): the current stream computes for that long
static void busy(double seconds) {
  {
    Lock l(G.mu);
    auto& s = stream(tl_stream);
    tick(s);
    s.c.ops++;
    G.busy_s += seconds;
    if (is_async(s)) {
      Job j;
      j.fn = [seconds] { wait_until(now() + seconds); };
      enqueue(s, std::move(j));
      return;
    }
  }
  wait_until(now() + seconds);
}
