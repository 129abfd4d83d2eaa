// Copies between host and device at a set bandwidth.
#pragma once
#include "memory.h"

// ---- transfers
// A cheap fingerprint of a staging buffer: was it changed between the call and the copy?
static uint64_t fingerprint(const char* p, size_t n) {
  uint64_t h = n * 0x9E3779B97F4A7C15ull;
  size_t step = n <= (1u << 16) ? 8 : 512, i = 0;
  for (; i + 8 <= n; i += step) {
    uint64_t v;
    std::memcpy(&v, p + i, 8);
    h = (h ^ v) * 0x100000001B3ull;
    h ^= h >> 29;
  }
  for (i = n / 8 * 8; i < n; i++) h = (h ^ uint8_t(p[i])) * 0x100000001B3ull;
  return h;
}
// Moves n bytes through a copy engine at its pace. Pageable memory has to be staged by the CPU first, so it
// holds the engine only part of the time.
static void engine_copy(bool h2d, bool pinned, char* dst, const char* src, size_t n) {
  Engine& e = h2d ? G.h2d : G.d2h;
  double bw = h2d ? G.cfg.h2d : G.cfg.d2h, lat = G.cfg.latency, pg = G.cfg.pageable;
  const size_t chunk = 1 << 20;
  // a DMA transfer: the engine is taken for all of it
  if (pinned) {
    std::lock_guard<std::mutex> l(e.mu);
    catch_up(e.free_at);
    double t0 = now();
    wait_until(t0 + lat);
    for (size_t i = 0; i < n; i += chunk) {
      size_t k = std::min(chunk, n - i);
      std::memcpy(dst + i, src + i, k);
      if (bw > 0) wait_until(t0 + lat + (i + k) / bw);
    }
    double d = now() - t0;
    e.free_at = now();
    Lock g(G.mu);
    e.busy += d;
    return;
  }
  double engine_bw = bw > 0 ? bw : 0, t0 = now(), busy = 0;
  wait_until(t0 + lat);
  for (size_t i = 0; i < n; i += chunk) {
    size_t k = std::min(chunk, n - i);
    double per = pg > 0 ? k / pg : 0, dma = engine_bw > 0 ? k / engine_bw : 0;
    double t1 = now();
    if (per > dma) wait_until(t1 + per - dma);
    std::lock_guard<std::mutex> l(e.mu);
    catch_up(e.free_at);
    double t2 = now();
    std::memcpy(dst + i, src + i, k);
    wait_until(t2 + std::min(dma, per > 0 ? per : dma));
    e.free_at = now();
    busy += now() - t2;
  }
  Lock g(G.mu);
  e.busy += busy;
}

// One host<->device copy of equal dtype and layout, on the current stream.
static void transfer(const Tensor& src, const Tensor& dst, bool non_blocking) {
  bool h2d = dst.is_privateuseone();
  const Tensor& dt = h2d ? dst : src;
  const Tensor& ht = h2d ? src : dst;
  size_t n = src.nbytes();
  char* d = static_cast<char*>(dst.data_ptr());
  const char* s = static_cast<const char*>(src.data_ptr());
  Job j;
  bool pinned, wait;
  int64_t id = tl_stream;
  uint64_t seq = 0;
  double t0 = now();
  NoGil nogil;
  {
    Lock l(G.mu);
    auto& st = stream(id);
    if (G.fail_copy > 0 && --G.fail_copy == 0) {
      l.unlock();
      cuda_like(719, "unspecified launch failure", "injected copy failure");
    }
    auto it = find_pin(ht.data_ptr(), n);
    pinned = it != G.pins.end();
    if (pinned) {
      j.pin = it->second.pin;
      if (!j.pin) {
        j.reg = it->first;
        j.keep = ht.storage();
      }
    }
    Kind k = h2d ? (pinned ? H2D_PINNED : H2D_PAGEABLE) : (pinned ? D2H_PINNED : D2H_PAGEABLE);
    st.c.n[k]++;
    st.c.bytes[k] += n;
    tick(st);
    if (auto m = mem_of(dt)) {
      auto [lo, hi] = span(dt);
      touch(*m, lo, hi, h2d, st, std::string(KIND[k]) + " copy");
      j.mems = {m};
    }
    wait = !(pinned && non_blocking);
    uint64_t fp = 0;
    bool check = is_async(st) && !wait && h2d;
    if (is_async(st)) {
      if (check) {
        l.unlock();
        fp = fingerprint(s, n);
        l.lock();
      }
      j.h2d = h2d;
      j.fn = [=] {
        engine_copy(h2d, pinned, d, s, n);
        if (check && fingerprint(s, n) != fp) {
          Lock g(G.mu);
          hazard(STAGING_CHANGED,
                 std::to_string(n) +
                     " pinned bytes changed between the call and the end of the copy on stream " +
                     std::to_string(id));
        }
      };
      seq = enqueue(st, std::move(j));
    }
  }
  // a synchronous stream: in order, on this thread
  if (!seq) engine_copy(h2d, pinned, d, s, n);
  if (seq && wait) wait_seq(id, seq, G.blocked_copy_s);
  Lock l(G.mu);
  if (!seq) G.blocked_copy_s += now() - t0;
  // CUDA synchronises with the stream here
  if (!non_blocking || (!h2d && !pinned)) G.host.merge(stream(id).vc);
  if (wait) raise_error(l);
}
