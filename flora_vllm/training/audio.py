"""Sound files as speech models take them: one channel, float32, 16 kHz, whatever the file's format, rate and channels.

PyAV decodes and resamples (FFmpeg inside the wheel): one library for WAV, FLAC, MP3, Ogg and the rest, where soundfile
would need a second one to resample and reads fewer formats.
"""

from pathlib import Path
from typing import Any

import numpy as np

from flora_vllm.errors import ConfigError

SAMPLE_RATE = 16_000


def load_audio(path: Path) -> np.ndarray:
    """The sound in `path` as (samples,) float32 in -1..1 at SAMPLE_RATE; channels are mixed.

    Raises ConfigError, without the path, if the file isn't there, isn't sound, or is broken.
    """
    try:
        import av
    except ImportError:
        raise ConfigError('reading audio needs PyAV: pip install "flora-vllm[train]"') from None
    if not path.is_file():
        raise ConfigError("no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise ConfigError("holds no sound")
            samples = _decode(container, av.AudioResampler(format="fltp", rate=SAMPLE_RATE))
    except (av.FFmpegError, OSError) as error:
        raise ConfigError(f"can't be read as sound ({error.strerror or error})") from None
    if not samples.size:
        raise ConfigError("is an empty recording")
    return samples


def _decode(container: Any, resampler: Any) -> np.ndarray:
    frames = [frame for decoded in container.decode(audio=0) for frame in resampler.resample(decoded)]
    frames += resampler.resample(None)  # what the filter still holds
    # (channels, samples) a frame. FFmpeg's own mix to mono would make equal channels louder by 3 dB.
    return np.concatenate([frame.to_ndarray().mean(axis=0) for frame in frames] or [np.zeros(0, np.float32)])
