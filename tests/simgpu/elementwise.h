// Elementwise operators on tensors of several dtypes.
#pragma once
#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>

#include "compute.h"

template <class F>
static IValue map_tensors(const IValue& v, F&& f) {
  if (v.isTensor()) {
    const Tensor& t = v.toTensor();
    return t.defined() ? IValue(f(t)) : v;
  }
  if (v.isTensorList()) {
    c10::List<Tensor> o;
    for (const Tensor& t : v.toTensorVector()) o.push_back(t.defined() ? f(t) : t);
    return IValue(std::move(o));
  }
  if (v.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> o;
    for (std::optional<Tensor> t : v.toOptionalTensorVector())
      o.push_back(t && t->defined() ? std::optional<Tensor>(f(*t)) : t);
    return IValue(std::move(o));
  }
  return v;
}
static void run_kernel(const c10::OperatorHandle& op, torch::jit::Stack* st) {
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), st);
}
// A device's kernel converts numbers as it reads and writes them; the CPU's makes whole tensors of what it
// converts. So the operator is run in pieces whose converted numbers stay in the caches. False: it is none of
// those, or too small to gain.
static bool run_in_pieces(const c10::OperatorHandle& op, torch::jit::Stack* st) {
  static const std::unordered_set<std::string> NAMES = {"aten::add", "aten::sub", "aten::mul",
                                                        "aten::addcmul"};
  constexpr int64_t PIECE = 1 << 15;
  std::string name = op.schema().name();
  bool in_place = name.back() == '_', functional = !in_place && op.schema().overload_name() != "out";
  if (in_place) name.pop_back();
  if (!NAMES.count(name)) return false;
  std::vector<int64_t> shape;
  std::optional<at::ScalarType> type;
  bool several_types = false;
  for (const auto& v : *st) {
    if (!v.isTensor() || v.toTensor().dim() == 0) continue;
    const Tensor& t = v.toTensor();
    several_types = several_types || (type && *type != t.scalar_type());
    type = t.scalar_type();
    // (the result has no say in the shape)
    if (functional || in_place || &v != &st->back()) shape = at::infer_size(shape, t.sizes());
  }
  if (!several_types || c10::multiply_integers(shape) < 2 * PIECE) return false;
  // (one of another shape has to be resized)
  if (!functional && (in_place ? st->front() : st->back()).toTensor().sizes() != shape) return false;
  auto kernel = op;
  if (functional) {
    torch::jit::Stack meta;
    for (const auto& v : *st)
      meta.push_back(map_tensors(v, [](const Tensor& t) {
        Tensor m = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta));
        if (t.unsafeGetTensorImpl()->is_wrapped_number()) m.unsafeGetTensorImpl()->set_wrapped_number(true);
        return m;
      }));
    op.callBoxed(&meta);
    const Tensor& m = meta[0].toTensor();
    st->emplace_back(at::empty_strided(m.sizes(), m.strides(), m.options().device(at::kCPU)));
    kernel = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "out");
  }
  bool ternary = name == "aten::addcmul";
  int64_t dim = std::max_element(shape.begin(), shape.end()) - shape.begin();
  int64_t from_end = dim - int64_t(shape.size()), rows = shape[size_t(dim)];
  int64_t step = std::max<int64_t>(1, rows * PIECE / c10::multiply_integers(shape));
  at::parallel_for(0, (rows + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard no_grad;
    at::AutoDispatchBelowADInplaceOrView below;
    for (int64_t start = begin * step; start < std::min(rows, end * step); start += step) {
      auto part_shape = shape;
      part_shape[size_t(dim)] = std::min(step, rows - start);
      torch::jit::Stack part;
      for (const auto& v : *st)
        part.push_back(map_tensors(v, [&](const Tensor& t) {
          bool whole = t.dim() < -from_end || t.size(from_end) == 1;
          Tensor p = whole ? t : t.narrow(from_end, start, part_shape[size_t(dim)]);
          // The CPU has no vectorized loop in which two operands are repeated.
          return ternary && p.dim() > 0 && p.sizes() != part_shape ? p.expand(part_shape).contiguous() : p;
        }));
      run_kernel(kernel, &part);
    }
  });
  Tensor result = in_place ? st->front().toTensor() : st->back().toTensor();
  st->clear();
  st->emplace_back(result);
  return true;
}
