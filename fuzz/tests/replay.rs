//! Gives every target its corpus again: `fuzz/corpus/<target>/`, and for each input some mutants of it,
//! always the same ones. Needs no nightly compiler; a panic on any thread is a failure.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::time::ClockId;

/// Mutants of each input; `SEPAL_FUZZ_MUTANTS` says another number.
const MUTANTS: u64 = 20;
/// Most processor time that an input may take; time alone says little where others work as well.
const LONGEST: Duration = Duration::from_secs(10);

static PANICS: AtomicU64 = AtomicU64::new(0);

/// xorshift: a mutant is told by its seed.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    /// Changes some bytes, cuts, doubles or adds some.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(6) {
                0 => bytes.truncate(at),
                1 => bytes.extend((0..self.below(32)).map(|_| 0)),
                2 => {
                    let end = (at + self.below(24)).min(bytes.len());
                    let piece = bytes[at..end].to_vec();
                    let to = self.below(bytes.len() + 1);
                    bytes.splice(to..to, piece);
                }
                3 => {
                    let noise: Vec<u8> = (0..self.below(16)).map(|_| self.next() as u8).collect();
                    bytes.splice(at..at, noise);
                }
                _ => {
                    let value = self.next();
                    let odd = [0, 1, 0x7f, 0x80, 0xff, value as u8];
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = odd[(value >> 8) as usize % odd.len()];
                    }
                }
            }
        }
    }
}

/// Whether the target takes it.
fn run(target: fn(&[u8]), bytes: &[u8]) -> bool {
    let spent = || Duration::from(ClockId::CLOCK_PROCESS_CPUTIME_ID.now().unwrap());
    let (before, begin) = (PANICS.load(Ordering::SeqCst), spent());
    let done = catch_unwind(AssertUnwindSafe(|| target(bytes))).is_ok();
    done && PANICS.load(Ordering::SeqCst) == before && spent() - begin < LONGEST
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn every_corpus_is_taken() {
    // Workers of devices catch their panics.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        report(panic);
    }));
    let mutants = std::env::var("SEPAL_FUZZ_MUTANTS").map_or(MUTANTS, |n| n.parse().unwrap());
    let only = std::env::var("SEPAL_FUZZ_TARGET").ok();
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut failed = Vec::new();
    for (name, target) in sepal_fuzz::TARGETS {
        if only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let begin = Instant::now();
        let listed = fs::read_dir(corpora.join(name)).expect("each target has a corpus");
        let mut inputs: Vec<_> = listed.map(|entry| entry.unwrap().path()).collect();
        inputs.sort();
        assert!(!inputs.is_empty(), "the corpus of {name} is empty");
        let mut runs = 0;
        for (number, input) in inputs.iter().enumerate() {
            let bytes = fs::read(input).unwrap();
            if !run(target, &bytes) {
                failed.push(format!("{name}: {}", input.display()));
                continue;
            }
            for mutant in 0..mutants {
                let seed =
                    0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(1 + (number as u64) * 1000 + mutant);
                let mut changed = bytes.clone();
                Chance(seed).mutate(&mut changed);
                runs += 1;
                if !run(target, &changed) {
                    failed.push(format!("{name}: {}", hex(&changed)));
                    break;
                }
            }
        }
        let took = begin.elapsed().as_millis();
        println!("{name}: {} inputs, {runs} mutants, {took} ms", inputs.len());
    }
    assert!(failed.is_empty(), "not taken:\n{}", failed.join("\n"));
}
