//! One-second clips of sound, made from a seed, as log-mel frames.

use std::f64::consts::TAU;

use retune_core::random::{Random, Seed};

/// Frames of a clip.
pub(crate) const FRAMES: usize = 30;

/// Mel bins of a frame.
pub(crate) const MELS: usize = 64;

/// Ways of modulation: what the first labelling tells apart.
pub(crate) const KINDS: usize = 8;

/// Directions and rates: steady, up, down, slow, fast.
pub(crate) const MOTIONS: usize = 5;

const RATE: f64 = 16_000.0;
const SAMPLES: usize = 16_000;
const WINDOW: usize = 1024;
const HOP: usize = 500;

/// The twelve classes of clips, each with its kind and its motion.
const CLASSES: [(Sound, u32, u32); 12] = [
    (Sound::Tone, 0, 0),
    (Sound::Chirp(1.0), 1, 1),
    (Sound::Chirp(-1.0), 1, 2),
    (Sound::Noise, 2, 0),
    (Sound::Clicks(SLOW), 3, 3),
    (Sound::Clicks(FAST), 3, 4),
    (Sound::Amplitude(SLOW), 4, 3),
    (Sound::Amplitude(FAST), 4, 4),
    (Sound::Frequency(SLOW), 5, 3),
    (Sound::Frequency(FAST), 5, 4),
    (Sound::Chord([1.0, 1.26, 1.498]), 6, 0),
    (Sound::Chord([1.0, 1.189, 1.498]), 7, 0),
];

/// Repetitions per second.
const SLOW: (f64, f64) = (2.5, 4.5);
const FAST: (f64, f64) = (5.5, 9.0);

#[derive(Debug, Clone, Copy)]
enum Sound {
    Tone,
    /// A pitch that moves over an octave, up or down.
    Chirp(f64),
    /// Noise in a band.
    Noise,
    /// Short bursts at a rate.
    Clicks((f64, f64)),
    /// A tone of swelling loudness.
    Amplitude((f64, f64)),
    /// A tone of swinging pitch.
    Frequency((f64, f64)),
    /// Three tones.
    Chord([f64; 3]),
}

/// Clips and what is to be heard in them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Clips {
    /// `[count, FRAMES, MELS]`, each clip with mean 0 and deviation 1.
    pub(crate) frames: Vec<f32>,
    /// `[count]`, below [`KINDS`].
    pub(crate) kinds: Vec<u32>,
    /// `[count]`, below [`MOTIONS`].
    pub(crate) motions: Vec<u32>,
}

impl Clips {
    /// Makes `count` clips, the classes in turn.
    pub(crate) fn make(count: usize, seed: Seed) -> Self {
        let ear = Ear::new();
        let mut clips = Self::default();
        for index in 0..count {
            let mut random = seed.stream("clip", &[index as u64]);
            let (sound, kind, motion) = CLASSES[index % CLASSES.len()];
            clips.frames.extend(ear.hear(&sound.play(&mut random)));
            clips.kinds.push(kind);
            clips.motions.push(motion);
        }
        clips
    }
}

fn between((low, high): (f64, f64), random: &mut Random) -> f64 {
    low + (high - low) * random.uniform()
}

impl Sound {
    /// Plays it at a random pitch and loudness, over noise.
    fn play(self, random: &mut Random) -> Vec<f64> {
        // Pitches lie evenly on a logarithmic scale.
        let pitch = 200.0 * 8.0_f64.powf(random.uniform());
        let gain = 0.2 + 0.8 * random.uniform();
        let noise = gain * between((0.02, 0.25), random);
        let start = random.uniform();
        let mut phase = start;
        // A resonance that white noise excites, for noise in a band.
        let (mut last, mut before) = (0.0, 0.0);
        let swing = match self {
            Self::Clicks(rate) | Self::Amplitude(rate) | Self::Frequency(rate) => {
                between(rate, random)
            }
            _ => 0.0,
        };
        let sample = |index: usize| {
            let t = index as f64 / RATE;
            let turn = swing * t + start;
            let mut tone = |frequency: f64| {
                phase += frequency / RATE;
                (TAU * phase).sin()
            };
            let sound = match self {
                Self::Tone => tone(pitch),
                Self::Chirp(way) => tone(pitch * (way * (t - 0.5)).exp2()),
                Self::Noise => {
                    let radius = 0.99;
                    let turn = 2.0 * radius * (TAU * pitch / RATE).cos();
                    let next = random.normal() + turn * last - radius * radius * before;
                    (before, last) = (last, next);
                    0.05 * next
                }
                Self::Clicks(_) => {
                    let since = turn.fract() / swing;
                    tone(pitch) * (-since / 0.02).exp()
                }
                Self::Amplitude(_) => tone(pitch) * (0.5 + 0.5 * (TAU * turn).sin()),
                Self::Frequency(_) => tone(pitch * (0.25 * (TAU * turn).sin()).exp2()),
                Self::Chord(steps) => {
                    let together = |step: &f64| (TAU * (pitch * step * t + start)).sin();
                    steps.iter().map(together).sum::<f64>() / 3.0
                }
            };
            gain * sound + noise * random.normal()
        };
        (0..SAMPLES).map(sample).collect()
    }
}

/// The window and the mel filters.
struct Ear {
    window: Vec<f64>,
    /// First bin and weights of each filter.
    filters: Vec<(usize, Vec<f64>)>,
}

impl Ear {
    fn new() -> Self {
        let window = (0..WINDOW).map(|n| 0.5 - 0.5 * (TAU * n as f64 / WINDOW as f64).cos());
        let mel = |hertz: f64| 2595.0 * (1.0 + hertz / 700.0).log10();
        let hertz = |mel: f64| 700.0 * (10.0_f64.powf(mel / 2595.0) - 1.0);
        let (low, high) = (mel(80.0), mel(RATE / 2.0));
        let edge = |index: usize| hertz(low + (high - low) * index as f64 / (MELS + 1) as f64);
        let filter = |index: usize| {
            let [left, middle, right] = [edge(index), edge(index + 1), edge(index + 2)];
            let bin = RATE / WINDOW as f64;
            let first = (left / bin).ceil() as usize;
            let last = ((right / bin).floor() as usize).min(WINDOW / 2);
            let weight = |bin_number: usize| {
                let at = bin_number as f64 * bin;
                ((at - left) / (middle - left)).min((right - at) / (right - middle)).max(0.0)
            };
            (first, (first..=last).map(weight).collect())
        };
        Self { window: window.collect(), filters: (0..MELS).map(filter).collect() }
    }

    /// Computes log-mel frames, `[FRAMES, MELS]`, brought to mean 0 and deviation 1.
    fn hear(&self, samples: &[f64]) -> Vec<f32> {
        let mut frames = Vec::with_capacity(FRAMES * MELS);
        for frame in 0..FRAMES {
            let piece = &samples[frame * HOP..frame * HOP + WINDOW];
            let mut real: Vec<f64> = piece.iter().zip(&self.window).map(|(s, w)| s * w).collect();
            let mut imaginary = vec![0.0; WINDOW];
            transform(&mut real, &mut imaginary);
            for (first, weights) in &self.filters {
                let power = |(place, weight): (usize, &f64)| {
                    let bin = first + place;
                    weight * (real[bin] * real[bin] + imaginary[bin] * imaginary[bin])
                };
                let energy: f64 = weights.iter().enumerate().map(power).sum();
                frames.push((energy + 1e-3).ln());
            }
        }
        let count = frames.len() as f64;
        let mean = frames.iter().sum::<f64>() / count;
        let variance = frames.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        let deviation = variance.sqrt().max(1e-6);
        frames.iter().map(|value| ((value - mean) / deviation) as f32).collect()
    }
}

/// Fourier's transform in place, of a power of two of numbers (Cooley and Tukey, 1965).
fn transform(real: &mut [f64], imaginary: &mut [f64]) {
    let count = real.len();
    let bits = count.trailing_zeros();
    for index in 0..count {
        let other = index.reverse_bits() >> (usize::BITS - bits);
        if index < other {
            real.swap(index, other);
            imaginary.swap(index, other);
        }
    }
    let mut half = 1;
    while half < count {
        for place in 0..half {
            let (sine, cosine) = (-TAU * place as f64 / (2 * half) as f64).sin_cos();
            for start in (place..count).step_by(2 * half) {
                let (a, b) = (start, start + half);
                let turned = (
                    real[b] * cosine - imaginary[b] * sine,
                    real[b] * sine + imaginary[b] * cosine,
                );
                (real[b], imaginary[b]) = (real[a] - turned.0, imaginary[a] - turned.1);
                real[a] += turned.0;
                imaginary[a] += turned.1;
            }
        }
        half *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_transform_is_that_of_its_definition() {
        let signal: Vec<f64> = (0..16).map(|n| ((n * n) % 7) as f64 - 2.0).collect();
        let (mut real, mut imaginary) = (signal.clone(), vec![0.0; 16]);
        transform(&mut real, &mut imaginary);
        for bin in 0..16 {
            let turn = |n: usize| -TAU * (bin * n) as f64 / 16.0;
            let cosines: f64 = (0..16).map(|n| signal[n] * turn(n).cos()).sum();
            let sines: f64 = (0..16).map(|n| signal[n] * turn(n).sin()).sum();
            assert!((real[bin] - cosines).abs() < 1e-9 && (imaginary[bin] - sines).abs() < 1e-9);
        }
    }

    #[test]
    fn a_tone_is_loudest_where_its_pitch_lies() {
        let ear = Ear::new();
        let tone: Vec<f64> = (0..SAMPLES).map(|n| (TAU * 1000.0 * n as f64 / RATE).sin()).collect();
        let frames = ear.hear(&tone);
        // 1000 Hz is 1000 mel; filters lie 41.8 mel apart, the first middle at 163 mel.
        for frame in frames.chunks_exact(MELS) {
            let loudest = (0..MELS).max_by(|a, b| frame[*a].total_cmp(&frame[*b]));
            assert_eq!(loudest, Some(20));
        }
        assert!(ear.filters.iter().all(|(_, weights)| weights.iter().sum::<f64>() > 0.0));
    }

    #[test]
    fn clips_depend_on_seed_and_place_only() {
        let (few, many) = (Clips::make(3, Seed(1)), Clips::make(13, Seed(1)));
        assert_eq!(few.frames[..], many.frames[..3 * FRAMES * MELS]);
        assert_ne!(few.frames, Clips::make(3, Seed(2)).frames);
        assert_eq!((many.kinds[12], many.motions[12]), (0, 0));
    }
}
