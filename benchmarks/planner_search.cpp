// A long search for the best residents of a budget, on a step model of its own: random constructions, and
// simulated annealing from the best of them.
//
// Compiled and called by planner_judge.py. All arrays are in execution order; sizes and addresses in bytes,
// times in seconds.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace {

constexpr int kWarmUpSteps = 2;

struct Model {
    int count;
    const int64_t* nbytes;
    const double* compute_s;
    const double* read_s;  // of compute_s, until a layer's bytes have been read
    double link_bytes_per_s;
};

// The mean of the steps after the warm-up, or more than `limit_s` as soon as it cannot be below that.
// A slot is taken at `head`, or at 0 where it would pass the ring's end; it waits for everything that was
// written there, or between, one round before.
class Evaluator {
public:
    explicit Evaluator(const Model& model) : model_(model) {}

    double step_s(const std::vector<uint8_t>& swapped, int64_t ring_bytes, int averaged, double limit_s) {
        int64_t moved = 0;
        order_.clear();
        double total_compute_s = 0, gap = 0;
        for (int i = 0; i < model_.count; ++i) {
            total_compute_s += model_.compute_s[i];
            if (swapped[i] && model_.nbytes[i] > 0) {
                order_.push_back({model_.nbytes[i], gap, model_.compute_s[i], model_.read_s[i]});
                moved += model_.nbytes[i];
                gap = 0;
            } else {
                gap += model_.compute_s[i];
            }
        }
        double bound_s = std::max(total_compute_s, double(moved) / model_.link_bytes_per_s);
        if (order_.empty() || bound_s > limit_s) return bound_s;
        const size_t count = order_.size();
        const size_t uses = count * (kWarmUpSteps + averaged);
        if (slots_.size() < uses) slots_.resize(uses);
        double copied_s = 0, computed_s = 0, free_s = 0, warm_s = 0;
        int64_t position = 0;  // grows forever
        size_t oldest = 0, next = 0;
        for (int step = 0; step < kWarmUpSteps + averaged; ++step) {
            if (step == kWarmUpSteps) warm_s = computed_s;
            for (const Swapped& layer : order_) {
                int64_t left = ring_bytes - position % ring_bytes;
                if (layer.nbytes > left) position += left;
                Slot& slot = slots_[next++];
                slot.start = position;
                position += layer.nbytes;
                while (slots_[oldest].start < position - ring_bytes) free_s = slots_[oldest++].free_s;
                copied_s = std::max(copied_s, free_s) + double(layer.nbytes) / model_.link_bytes_per_s;
                computed_s = std::max(computed_s + layer.before_s, copied_s);
                slot.free_s = computed_s + layer.read_s;
                computed_s += layer.compute_s;
            }
            computed_s += gap;
            if (step >= kWarmUpSteps) {
                double left_s = (kWarmUpSteps + averaged - 1 - step) * bound_s;
                // What was fetched before the averaged steps may be missing from them: a ring's worth.
                double credit_s = double(ring_bytes) / model_.link_bytes_per_s;
                double at_least = (computed_s - warm_s + left_s - credit_s) / averaged;
                if (at_least > limit_s) return at_least;
            }
        }
        return std::max((computed_s - warm_s) / averaged, bound_s);
    }

private:
    struct Swapped {
        int64_t nbytes;
        double before_s;  // compute of residents before it
        double compute_s, read_s;
    };
    struct Slot {
        int64_t start;
        double free_s;
    };
    const Model& model_;
    std::vector<Swapped> order_;
    std::vector<Slot> slots_;
};

// Swapped layers by error diffusion: each second of compute adds `rate` to what is owed, a swapped layer
// takes its bytes off. What is owed is at most `reach_bytes`; a layer is swapped where it is at least
// `threshold` of the layer's bytes; a step begins with `phase_bytes`.
struct Construction {
    int64_t limit_bytes, ring_bytes;
    double reach_bytes, threshold, phase_bytes;
    bool idle_first;

    bool build(const Model& model, int64_t budget_bytes, std::vector<uint8_t>& swapped) const {
        int64_t must_move = ring_bytes - budget_bytes, free_bytes = 0;
        double total_s = 0;
        std::vector<uint8_t> kept(model.count);
        for (int i = 0; i < model.count; ++i) {
            kept[i] = model.nbytes[i] > limit_bytes || model.nbytes[i] == 0 ||
                      (idle_first && model.compute_s[i] == 0);
            must_move += model.nbytes[i];
            total_s += model.compute_s[i];
            if (!kept[i]) free_bytes += model.nbytes[i];
        }
        if (must_move > free_bytes) return false;
        double trace = (total_s > 0 ? 1e-6 * total_s : 1.0) / double(std::max<int64_t>(free_bytes, 1));
        std::vector<uint8_t> tried(model.count);
        double low = 0, high = 8 * double(free_bytes) / (total_s + trace * double(free_bytes));
        bool found = false;
        for (int bisection = 0; bisection < 24; ++bisection) {
            double rate = (low + high) / 2, owed = phase_bytes;
            int64_t moved = 0;
            for (int i = 0; i < model.count; ++i) {
                if (!kept[i]) owed += rate * trace * double(model.nbytes[i]);
                owed = std::min(owed, reach_bytes);
                tried[i] = !kept[i] && owed >= threshold * double(model.nbytes[i]);
                if (tried[i]) {
                    owed -= double(model.nbytes[i]);
                    moved += model.nbytes[i];
                }
                owed += rate * model.compute_s[i];
            }
            if (moved >= must_move) {
                swapped = tried;
                found = true;
                high = rate;
            } else {
                low = rate;
            }
        }
        return found;
    }
};

struct State {
    std::vector<uint8_t> swapped;
    int64_t resident_bytes = 0;
    int64_t spare_bytes = 0;  // of the budget that the ring leaves unused
};

}  // namespace

extern "C" {

double planner_step_s(int count, const int64_t* nbytes, const double* compute_s, const double* read_s,
                      double link_bytes_per_s, const uint8_t* swapped, int64_t ring_bytes, int averaged) {
    Model model{count, nbytes, compute_s, read_s, link_bytes_per_s};
    return Evaluator(model).step_s({swapped, swapped + count}, ring_bytes, averaged, INFINITY);
}

// Tries random constructions; writes the `keep` best that differ: `swapped` (keep x count), rings and steps
// (infinite where fewer were found).
void planner_construct(int count, const int64_t* nbytes, const double* compute_s, const double* read_s,
                       double link_bytes_per_s, int64_t budget_bytes, int tries, int averaged, uint64_t seed, int keep,
                       uint8_t* swapped, int64_t* rings, double* steps_s) {
    Model model{count, nbytes, compute_s, read_s, link_bytes_per_s};
    Evaluator evaluator(model);
    std::mt19937_64 random(seed);
    auto unit = [&] { return double(random() >> 11) * 0x1p-53; };
    std::vector<int64_t> sizes;
    for (int i = 0; i < count; ++i) {
        if (nbytes[i] > 0) sizes.push_back(nbytes[i]);
    }
    std::sort(sizes.begin(), sizes.end());
    sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
    std::fill(steps_s, steps_s + keep, INFINITY);
    std::vector<uint8_t> built;
    for (int tried = 0; tried < tries; ++tried) {
        // The larger sizes are likelier: a small ring has to hold the largest swapped layer.
        Construction construction;
        construction.limit_bytes = sizes[size_t((1 - unit() * unit()) * double(sizes.size() - 1) + 0.5)];
        if (unit() < 0.5) {
            construction.ring_bytes = int64_t(double(construction.limit_bytes) * std::exp(unit() * 3.0));
        } else {
            // Room for a few layers, to the byte: nothing is left over at the ring's end.
            construction.ring_bytes = construction.limit_bytes;
            for (int more = int(unit() * 6); more > 0; --more) {
                int64_t size = nbytes[random() % uint64_t(count)];
                if (size <= construction.limit_bytes) construction.ring_bytes += size;
            }
        }
        construction.reach_bytes =
            unit() < 0.3 ? INFINITY : double(construction.ring_bytes) * (0.3 + 1.2 * unit());
        construction.threshold = unit() < 0.3 ? 0.5 : unit();
        construction.phase_bytes = unit() < 0.3 ? 0 : (2 * unit() - 1) * double(construction.limit_bytes);
        construction.idle_first = unit() < 0.3;
        if (construction.ring_bytes > budget_bytes) continue;
        if (!construction.build(model, budget_bytes, built)) continue;
        int64_t resident_bytes = 0;
        for (int i = 0; i < count; ++i) resident_bytes += built[i] ? 0 : nbytes[i];
        // What was swapped beyond need makes the ring larger.
        int64_t ring_bytes = unit() < 0.5 ? construction.ring_bytes : budget_bytes - resident_bytes;
        double step_s = evaluator.step_s(built, ring_bytes, averaged, steps_s[keep - 1]);
        bool known = false;
        for (int k = 0; k < keep; ++k) known = known || steps_s[k] == step_s;
        if (known || !(step_s < steps_s[keep - 1])) continue;
        int place = keep - 1;
        for (; place > 0 && steps_s[place - 1] > step_s; --place) {
            steps_s[place] = steps_s[place - 1];
            rings[place] = rings[place - 1];
            std::copy_n(swapped + size_t(place - 1) * count, count, swapped + size_t(place) * count);
        }
        steps_s[place] = step_s;
        rings[place] = ring_bytes;
        std::copy(built.begin(), built.end(), swapped + size_t(place) * count);
    }
}

// Improves `swapped` in place and returns its step; `ring_bytes` in and out. Layers larger than `limit_bytes`
// stay resident. Ends early at `enough_s`.
double planner_search(int count, const int64_t* nbytes, const double* compute_s, const double* read_s,
                      double link_bytes_per_s, int64_t budget_bytes, int64_t limit_bytes, uint8_t* swapped, int64_t* ring_bytes,
                      int rounds, double heat, double enough_s, int averaged, uint64_t seed) {
    Model model{count, nbytes, compute_s, read_s, link_bytes_per_s};
    Evaluator evaluator(model);
    std::mt19937_64 random(seed);
    auto unit = [&] { return double(random() >> 11) * 0x1p-53; };
    auto below = [&](int n) { return int(random() % uint64_t(n)); };

    State now{{swapped, swapped + count}};
    for (int i = 0; i < count; ++i) now.resident_bytes += now.swapped[i] ? 0 : nbytes[i];
    now.spare_bytes = std::max<int64_t>(0, budget_bytes - now.resident_bytes - *ring_bytes);
    double now_s = evaluator.step_s(now.swapped, *ring_bytes, averaged, INFINITY);
    State best = now, tried;
    double best_s = now_s;

    auto flip = [&](int i) {
        tried.resident_bytes += tried.swapped[i] ? nbytes[i] : -nbytes[i];
        tried.swapped[i] ^= 1;
    };
    auto pick = [&](bool fetched, int near, int reach) {  // -1 where there is none
        for (int tries = 0; tries < 20; ++tries) {
            int i = near < 0 ? below(count) : ((near + below(2 * reach + 1) - reach) % count + count) % count;
            if (bool(tried.swapped[i]) == fetched && nbytes[i] > 0 && nbytes[i] <= limit_bytes) return i;
        }
        return -1;
    };
    for (int round = 0; round < rounds && best_s > enough_s; ++round) {
        double share = 1.0 - double(round) / rounds;
        tried = now;
        double kind = unit();
        int exchanges = kind < 0.6 ? 1 : 1 + below(3);
        for (int k = 0; k < exchanges; ++k) {
            int out = pick(true, -1, 0);
            int reach = unit() < 0.5 ? 8 : count / 2;
            if (kind > 0.15 && out >= 0) flip(out);
            int in = pick(false, unit() < 0.7 ? out : -1, reach);
            if (kind < 0.85 && in >= 0) flip(in);
        }
        if (unit() < 0.05) {
            // Another share of the budget left unused: where the ring wraps changes.
            tried.spare_bytes = unit() < 0.5 ? 0 : int64_t(unit() * unit() * 0.2 * double(*ring_bytes));
        }
        int64_t largest = 0;
        for (int i = 0; i < count; ++i) {
            if (tried.swapped[i]) largest = std::max(largest, nbytes[i]);
        }
        int64_t ring = budget_bytes - tried.resident_bytes - tried.spare_bytes;
        if (ring < largest) {
            ring = budget_bytes - tried.resident_bytes;
            tried.spare_bytes = 0;
        }
        if (largest == 0 || ring < largest) continue;
        double limit_s = now_s * (1.0 - heat * share * share * std::log(unit() + 1e-300));
        double tried_s = evaluator.step_s(tried.swapped, ring, averaged, limit_s);
        if (tried_s > limit_s) continue;
        std::swap(now, tried);
        now_s = tried_s;
        if (now_s < best_s) {
            best_s = now_s;
            best = now;
            *ring_bytes = ring;
        }
    }
    std::copy(best.swapped.begin(), best.swapped.end(), swapped);
    return best_s;
}
}
