"""Every key of DALLE2-pytorch's decoder configs with its type and default: the README's, where the code has another.

The comment above a key is its entry in the reference. "One, or one per U-Net" is a value or a list of them.
"""

from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from eclosion.config.hub import RepoName, TokenPath
from eclosion.config.schema import Steps
from eclosion.config.templates import check_path
from eclosion.config.wandb import RunId, RunPath
from eclosion.registry import part

__all__ = [
    "Clip",
    "Data",
    "Decoder",
    "DecoderFile",
    "Evaluate",
    "Fid",
    "InceptionScore",
    "Kid",
    "Lpips",
    "Splits",
    "Tracker",
    "TrackerLoad",
    "TrackerLog",
    "TrackerSave",
    "Train",
    "Unet",
]

T = TypeVar("T")

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
InnerPath = Annotated[str, AfterValidator(check_path)]
Schedule = Literal["cosine", "linear", "quadratic", "jsd", "sigmoid"]
InceptionLayer = Literal[64, 192, 768, 2048]


@part
class Unet:
    """One U-Net; the same options as its constructor had."""

    # Channels of the first and last maps. Divides by resnet_groups.
    dim: int
    # Channels of each stage in multiples of dim; the resolution halves from stage to stage.
    dim_mults: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    # Numbers in an image embedding. Compared with the data; without a value, the data decides. The first U-Net alone is
    # told the embedding.
    image_embed_dim: Positive | None = None
    # Numbers in the encoding of a text token. Compared with the data; without a value, the data decides.
    text_embed_dim: Positive | None = None
    # Whether this U-Net is told text encodings.
    cond_on_text_encodings: bool | None = None
    # Numbers in each token of embedding, text and time; null means dim. May equal image_embed_dim here.
    cond_dim: int | None = None
    # Tokens that an image embedding becomes.
    num_image_tokens: int = 4
    # Tokens that a timestep becomes.
    num_time_tokens: int = 2
    # Whether stages end with self-attention: one answer, or one per stage.
    self_attn: bool | list[bool] = False
    # Whether the bottleneck has self-attention. Had no effect in the original, where it always had; it has one here.
    attend_at_middle: bool = True
    # Numbers per head of self-attention and linear attention.
    attn_dim_head: int = 32
    # Heads of self-attention and linear attention.
    attn_heads: int = 16
    # Whether stages without self-attention have linear attention.
    sparse_attn: bool = False
    # Whether cross-attention compares directions alone.
    cosine_sim_cross_attn: bool = False
    # Whether self-attention compares directions alone.
    cosine_sim_self_attn: bool = False
    # Tokens of text that are looked at.
    max_text_len: int = 256
    # Whether the image embedding is also added to the time.
    add_image_embeds_to_time: bool = True
    # Whether the network sees its own earlier estimate of the image: of x_0, in training as in sampling.
    self_cond: bool = False
    # Whether the first convolution has kernels of several sizes.
    init_cross_embed: bool = True
    # Their sizes.
    init_cross_embed_kernel_sizes: list[int] = field(default_factory=lambda: [3, 7, 15])
    # Size of its one kernel otherwise.
    init_conv_kernel_size: int = 7
    # Size of the last convolution's kernel.
    final_conv_kernel_size: int = 1
    # Groups of the group norms: one number, or one per stage.
    resnet_groups: int | list[int] = 8
    # Whether the kernels of residual blocks are standardised.
    resnet_weight_standardization: bool = False
    # Residual blocks per stage beside the first: one number, or one per stage.
    num_resnet_blocks: int | list[int] = 2
    # Whether convolutions with kernels of several sizes halve the resolution.
    cross_embed_downsample: bool = False
    # Their sizes.
    cross_embed_downsample_kernel_sizes: list[int] = field(default_factory=lambda: [2, 4])
    # Whether stages halve the resolution first and double it last.
    memory_efficient: bool = False
    # Whether skip connections are scaled by the root of one half.
    scale_skip_connection: bool = False
    # Whether resolution is doubled by unpacking channels; otherwise pixels are repeated.
    pixel_shuffle_upsample: bool = True
    # Whether the last block sees the outputs of all stages.
    combine_upsample_fmaps: bool = False
    # Whether activations are computed twice to save memory.
    checkpoint_during_training: bool = False
    # Only dim or null.
    init_dim: int | None = None
    # Accepted, has no effect because it had none.
    out_dim: int | None = None
    # Accepted, has no effect because the place in the cascade decides: the first U-Net alone is told the embedding.
    cond_on_image_embeds: bool = False
    # Accepted, has no effect because decoder.channels decides.
    channels: int = 3
    # Accepted, has no effect because decoder.learned_variance decides.
    channels_out: int | None = None
    # Accepted, has no effect because the place in the cascade decides.
    lowres_cond: bool = False
    # Accepted, has no effect because decoder.use_noise_for_lowres_cond decides.
    lowres_noise_cond: bool = False


@part
class Clip:
    """The network that makes image embeddings, and encodings of captions, while training."""

    # Whose: openai or open_clip. x-clip and coca are networks without weights, and are refused.
    make: Literal["openai", "open_clip", "x-clip", "coca"] = "openai"
    # Which, by its name there.
    model: Text = "ViT-L/14"
    # Accepted, has no effect because x-clip and coca alone had a use for it.
    base_model_kwargs: dict[str, Any] | None = None


@part
class Decoder:
    """The cascade and its diffusion."""

    # The U-Nets, from the smallest images to the largest.
    unets: Annotated[list[Unet], Field(min_length=1)]
    # Height and width of the images of each U-Net; they rise. Needed with more than one U-Net.
    image_sizes: list[Positive] | None = None
    # The same for one U-Net; has no effect beside image_sizes.
    image_size: int | None = None
    # Makes the image embeddings where the data has none; and, for U-Nets that are told text, encodings of the captions.
    clip: Clip | None = None
    # Channels of the images: 3.
    channels: int = 3
    # Noise levels.
    timesteps: Positive = 1000
    # Network calls per image, one or one per U-Net: null or timesteps for DDPM, fewer for DDIM.
    sample_timesteps: Positive | list[Positive | None] | None = None
    # Distance between prediction and target.
    loss_type: Literal["l1", "l2", "huber"] = "l2"
    # How noise rises, one or one per U-Net. null, other than the absence of the key, is linear for the last of several
    # U-Nets and cosine for the others.
    beta_schedule: Schedule | list[Schedule] | None = "cosine"
    # Whether the variance is learned. A list goes on with false; true is for the first U-Net alone.
    learned_variance: bool | list[bool] = True
    # Whether a sigmoid keeps the learned variance between its limits.
    learned_variance_constrain_frac: bool = False
    # Weight of the variational term that learns it.
    vb_loss_weight: NonNegativeFloat = 0.001
    # Whether the network predicts the image, one or one per U-Net.
    predict_x_start: bool | list[bool] = False
    # Whether it predicts v, one or one per U-Net; goes before predict_x_start.
    predict_v: bool | list[bool] = False
    # Accepted, has no effect because it is for U-Nets with an autoencoder, which a config cannot name.
    predict_x_start_for_latent_diffusion: bool = False
    # Share of images whose embedding is hidden in training.
    image_cond_drop_prob: Share = 0.1
    # Share of images whose text is hidden in training, independently.
    text_cond_drop_prob: Share = 0.5
    # Whether nothing is told to the networks.
    unconditional: bool = False
    # Side of the random squares on which each U-Net is trained; null, as for the first, for whole images.
    random_crop_sizes: list[Positive | None] | None = None
    # Whether noise is added to the small image that an upsampler sees: one answer, or one per U-Net with or without the
    # first.
    use_noise_for_lowres_cond: bool | list[bool] = False
    # Whether it is blurred in training: the same.
    use_blur_for_lowres_cond: bool | list[bool] = True
    # Whether it is made in the size of the U-Net before.
    lowres_downsample_first: bool = True
    # Share of images that are blurred; drawn for each image here, and for each batch there.
    blur_prob: Share = 0.5
    # Standard deviation of the blur in pixels, or a range [low, high]. A range works here.
    blur_sigma: PositiveFloat | tuple[PositiveFloat, PositiveFloat] = 0.6
    # Width of its kernel, odd, or a range [low, high]. A range works here.
    blur_kernel_size: Positive | tuple[Positive, Positive] = 3
    # Level of the noise in sampling.
    lowres_noise_sample_level: Share = 0.2
    # Whether estimates of the image are kept in [-1, 1] in sampling. Had no effect in the original, where they always
    # were; it has one here.
    clip_denoised: bool = True
    # The same: false for either turns it off.
    clip_x_start: bool = True
    # Whether estimates are scaled into [-1, 1] by a quantile of theirs.
    use_dynamic_thres: bool = False
    # The quantile.
    dynamic_thres_percentile: Annotated[float, Field(gt=0, le=1)] = 0.95
    # Exponent of the p2 weighting, one or one per U-Net; 0 is off.
    p2_loss_weight_gamma: NonNegativeFloat | list[NonNegativeFloat] = 0.0
    # Added to the signal to noise ratio in it.
    p2_loss_weight_k: PositiveFloat = 1.0
    # Fresh noise in each step of DDIM.
    ddim_sampling_eta: Share = 0.0
    # Accepted, has no effect because images are always in [-1, 1] inside, and files and uint8 outside.
    auto_normalize_img: bool = True
    # Accepted, has no effect because the encoder follows from decoder.clip alone.
    clip_adapter_overrides: dict[str, Any] = field(default_factory=dict)
    # Only null: an autoencoder cannot be written into a config.
    vae: None = None


@part
class Splits:
    """Shares of the shards; they sum to 1, to within 1e-6."""

    # What is trained on.
    train: Share = 0.75
    # What validation looks at.
    val: Share = 0.15
    # Kept for tests.
    test: Share = 0.1


@part
class Data:
    """Shards of images and arrays of embeddings."""

    # Where the shards are; {} stands for the number. "pipe:" needs --allow-pipe on the command line.
    webdataset_base_url: Text
    # Folder of image embeddings; without it, and without decoder.clip, they are read from the shards.
    img_embeddings_url: Text | None = None
    # Folder of text encodings; without it they are read from the shards, or decoder.clip makes them of the captions.
    text_embeddings_url: Text | None = None
    # Threads that decode images; 0 works here. Each image comes once an epoch, whatever their number.
    num_workers: NonNegative = 4
    # Images per step on one process; times the environment's WORLD_SIZE, which torchrun sets.
    batch_size: Positive = 64
    # First shard.
    start_shard: NonNegative = 0
    # Last shard, itself included. Shards that do not exist are left out, and named.
    end_shard: NonNegative = 9999999
    # Digits of the number in the URL.
    shard_width: Annotated[int, Field(ge=1, le=18)] = 6
    # Digits at the end of a key that are the row of its embeddings.
    index_width: Annotated[int, Field(ge=1, le=18)] = 4
    # How the shards are divided; samples are, where shards are too few.
    splits: Splits = field(default_factory=Splits)
    # Whether each epoch has its own order, of the samples too; the seed decides it.
    shuffle_train: bool = True
    # Whether shards are drawn at random with replacement. Needs shuffle_train false and train.epoch_samples.
    resample_train: bool = False
    # Transforms of torchvision in their order: true, or options. false is off here, and was on in the original.
    preprocessing: Steps = field(default_factory=lambda: [{"ToTensor": {}}])


@part
class Train:
    """How long, and how."""

    # Passes over the data, or over train.epoch_samples samples.
    epochs: Positive = 20
    # Learning rate, one or one per U-Net; at most 0.01, as in the original.
    lr: PositiveFloat | list[PositiveFloat] = 1e-4
    # Weight decay of matrices and kernels, one or one per U-Net; 0 is none.
    wd: NonNegativeFloat | list[NonNegativeFloat] = 0.01
    # Steps over which the learning rate rises, one or one per U-Net; null is 0.
    warmup_steps: NonNegative | list[NonNegative | None] | None = None
    # Accepted, has no effect because each U-Net exchanges its gradients by itself.
    find_unused_parameters: bool = True
    # Accepted, has no effect because each U-Net exchanges its gradients by itself.
    static_graph: bool = True
    # Gradients are scaled to this norm, one or one per U-Net; null leaves them.
    max_grad_norm: PositiveFloat | list[PositiveFloat] | None = 0.5
    # Samples between two checkpoints, and between two grids.
    save_every_n_samples: Positive = 100000
    # Images in a grid; 0 makes none.
    n_sample_images: NonNegative = 6
    # Guidance scale of sampling, one or one per U-Net. Works here.
    cond_scale: NonNegativeFloat | list[NonNegativeFloat] = 1.0
    # Where to train: cpu, mps, cuda or cuda:0. Works here; null takes a GPU if there is one.
    device: Text | None = None
    # Samples in what is called an epoch: with epochs, the length of the run.
    epoch_samples: Positive | None = None
    # Images that validation looks at; null takes all.
    validation_samples: Positive | None = None
    # Accepted, has no effect because a grid is always made before the first step, and a run that ends before its first
    # checkpoint is made again from its seed.
    save_immediately: bool = False
    # Whether averages of the weights are kept, and sampled with.
    use_ema: bool = True
    # Decay of the averages, at each step; in the original at each tenth.
    ema_beta: Annotated[float, Field(ge=0, lt=1)] = 0.99
    # Mixed precision: bf16 where the hardware has it. Works here.
    amp: bool = False
    # Which U-Nets are trained; false freezes one, and keeps it in checkpoints. null trains all.
    unet_training_mask: list[bool] | None = None
    # Accepted, has no effect because it had none: tracker.save says what is kept.
    save_all: bool = False
    # Accepted, has no effect because it had none: tracker.save says what is kept.
    save_latest: bool = True
    # Accepted, has no effect because it had none: tracker.save says what is kept.
    save_best: bool = True


@part
class Fid:
    """Options of torchmetrics' FrechetInceptionDistance."""

    # Width of the layer of the Inception network that is compared.
    feature: InceptionLayer = 2048
    # Weights of the network; null takes the usual ones.
    feature_extractor_weights_path: Text | None = None
    # Whether images are smoothed when they are made smaller; false resizes as TensorFlow did, as in published scores.
    antialias: bool = True
    # Accepted, has no effect because the network sees 299 x 299 pixels, whatever it is given.
    input_img_size: tuple[Positive, Positive, Positive] = (3, 299, 299)
    # Accepted, has no effect because what is known of real images is kept on disk, and is what it would be anew.
    reset_real_features: bool = True
    # Accepted, has no effect because scores are computed from the pixels of a PNG.
    normalize: bool = False
    # Accepted, has no effect because it says how torchmetrics keeps its sums.
    compute_on_cpu: bool = False
    # Accepted, has no effect because features of all processes are gathered, and scored once.
    dist_sync_on_step: bool = False
    # Accepted, has no effect because features of all processes are gathered, and scored once.
    sync_on_compute: bool = True
    # Accepted, has no effect because it says how torchmetrics keeps its sums.
    compute_with_cache: bool = True
    # Only null, the default: a file cannot hold anything else that torchmetrics takes.
    process_group: None = None
    # Only null, the default: a file cannot hold a function.
    dist_sync_fn: None = None
    # Only null, the default: a file cannot hold a function.
    distributed_available_fn: None = None


@part
class InceptionScore:
    """Options of torchmetrics' InceptionScore."""

    # Layer of the Inception network that is looked at; other than logits_unbiased it is no score of classes.
    feature: InceptionLayer | Literal["logits_unbiased"] = "logits_unbiased"
    # Parts into which the images are divided for its spread; each needs at least two images.
    splits: Positive = 10
    # Accepted, has no effect because scores are computed from the pixels of a PNG.
    normalize: bool = False
    # Accepted, has no effect because it says how torchmetrics keeps its sums.
    compute_on_cpu: bool = False
    # Accepted, has no effect because features of all processes are gathered, and scored once.
    dist_sync_on_step: bool = False
    # Accepted, has no effect because features of all processes are gathered, and scored once.
    sync_on_compute: bool = True
    # Accepted, has no effect because it says how torchmetrics keeps its sums.
    compute_with_cache: bool = True
    # Only null, the default: a file cannot hold anything else that torchmetrics takes.
    process_group: None = None
    # Only null, the default: a file cannot hold a function.
    dist_sync_fn: None = None
    # Only null, the default: a file cannot hold a function.
    distributed_available_fn: None = None


@part
class Kid:
    """Options of torchmetrics' KernelInceptionDistance."""

    # Layer of the Inception network that is compared.
    feature: InceptionLayer | Literal["logits_unbiased"] = 2048
    # Subsets over which it is averaged.
    subsets: Positive = 100
    # Images in a subset; at most n_evaluation_samples, and at most the images of the val part.
    subset_size: Annotated[int, Field(ge=2)] = 1000
    # Degree of the polynomial kernel.
    degree: Positive = 3
    # Its factor; null is one over the layer's width.
    gamma: Annotated[float, Field(gt=0)] | None = None
    # Its constant.
    coef: Annotated[float, Field(gt=0)] = 1.0
    # Weights of the network; null takes the usual ones. Works here.
    feature_extractor_weights_path: Text | None = None
    # Accepted, has no effect because what is known of real images is kept on disk, and is what it would be anew.
    reset_real_features: bool = True
    # Accepted, has no effect because scores are computed from the pixels of a PNG.
    normalize: bool = False
    # Accepted, has no effect because it says how torchmetrics keeps its sums.
    compute_on_cpu: bool = False
    # Accepted, has no effect because features of all processes are gathered, and scored once.
    dist_sync_on_step: bool = False
    # Accepted, has no effect because features of all processes are gathered, and scored once.
    sync_on_compute: bool = True
    # Accepted, has no effect because it says how torchmetrics keeps its sums.
    compute_with_cache: bool = True
    # Only null, the default: a file cannot hold anything else that torchmetrics takes.
    process_group: None = None
    # Only null, the default: a file cannot hold a function.
    dist_sync_fn: None = None
    # Only null, the default: a file cannot hold a function.
    distributed_available_fn: None = None


@part
class Lpips:
    """Options of torchmetrics' LearnedPerceptualImagePatchSimilarity."""

    # The network whose layers are compared.
    net_type: Literal["alex", "vgg", "squeeze"] = "alex"
    # How the images are summed up. none and null, which are no sum, are refused: a score is one number.
    reduction: Literal["mean", "sum", "none"] | None = "mean"
    # Accepted, has no effect because scores are computed from the pixels of a PNG.
    normalize: bool = False
    # Accepted, has no effect because it says how torchmetrics keeps its sums.
    compute_on_cpu: bool = False
    # Accepted, has no effect because features of all processes are gathered, and scored once.
    dist_sync_on_step: bool = False
    # Accepted, has no effect because features of all processes are gathered, and scored once.
    sync_on_compute: bool = True
    # Accepted, has no effect because it says how torchmetrics keeps its sums.
    compute_with_cache: bool = True
    # Only null, the default: a file cannot hold anything else that torchmetrics takes.
    process_group: None = None
    # Only null, the default: a file cannot hold a function.
    dist_sync_fn: None = None
    # Only null, the default: a file cannot hold a function.
    distributed_available_fn: None = None


@part
class Evaluate:
    """Metrics at the end of each epoch, of images made with the averages of the weights, against the val part."""

    # Images that are made for them; at most as many as the val part has.
    n_evaluation_samples: Positive = 1000
    # Frechet inception distance; an object switches it on, null is off.
    FID: Fid | None = None
    # Inception score, of the images that are made; an object switches it on, null is off.
    IS: InceptionScore | None = None
    # Kernel inception distance; an object switches it on, null is off.
    KID: Kid | None = None
    # Learned perceptual image patch similarity between an original and what is made from it; an object switches it on,
    # null is off.
    LPIPS: Lpips | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that are on, in the order of the original."""
        return tuple(name for name in ("FID", "IS", "KID", "LPIPS") if getattr(self, name) is not None)


@part
class TrackerLog:
    """Where numbers go, beside metrics.jsonl."""

    # console, wandb, or another logger that `eclosion list loggers` shows.
    log_type: Text = "console"
    # For wandb: whether to go on with the run at wandb that wandb_run_id names, which must be there.
    resume: bool = False
    # For wandb: whether a run that is started again goes on with its own run at wandb; else each start makes a new one.
    # Its training goes on in any case.
    auto_resume: bool = False
    # Whether numbers are shown on the console too.
    verbose: bool = False
    # Required with wandb.
    wandb_entity: Text | None = None
    # Required with wandb.
    wandb_project: Text | None = None
    # For wandb.
    wandb_run_name: str | None = None
    # For wandb: the run that resume goes on with; without resume the run folder keeps an id of its own.
    wandb_run_id: RunId | None = None


@part
class TrackerLoad:
    """What a run without a checkpoint of its own starts from: what a saver has saved, or a file of the original."""

    # local, url, wandb or huggingface; null loads nothing.
    load_from: Literal["local", "url", "wandb", "huggingface"] | None = None
    # Whether it is loaded only where a run was before, whose own checkpoints are gone.
    only_auto_resume: bool = False
    # Required with local: the path, relative to the current directory.
    file_path: Text | None = None
    # Required with url: an https:// address.
    url: Text | None = None
    # Required with wandb: the path among the files of the run.
    wandb_file_path: InnerPath | None = None
    # For wandb: entity/project/run_id; none takes the run that numbers go to.
    wandb_run_path: RunPath | None = None
    # Required with huggingface: the repository.
    huggingface_repo: RepoName | None = None
    # For huggingface: a folder or file in the repository; none takes the repository itself.
    huggingface_file_path: InnerPath | None = None
    # For huggingface: a file with the token, if HF_TOKEN is not set.
    token_path: TokenPath | None = None


@part
class TrackerSave:
    """Where checkpoints go, besides the run folder.

    Paths may hold {epoch}, {sample}, {samples_seen}, {step} and {best_validation_loss}.
    """

    # local, huggingface or wandb.
    save_to: Literal["local", "huggingface", "wandb"] = "local"
    # Path that the newest checkpoint gets; true is latest.pth, null or false none. A local one is relative to the
    # current directory. What is saved is a folder, whatever its name.
    save_latest_to: Text | bool | None = None
    # The same for the checkpoint that is best by its validation loss; true is best.pth.
    save_best_to: Text | bool | None = None
    # Folder for the config and other files about the run; null for none.
    save_meta_to: Text | None = None
    # Whole checkpoints, from which a run goes on, or models: the averaged weights, which make pictures.
    save_type: Literal["checkpoint", "model"] = "checkpoint"
    # Required with huggingface: the repository. It is made, for its owner alone, if it is not there.
    huggingface_repo: RepoName | None = None
    # For huggingface: a file with the token, if HF_TOKEN is not set.
    token_path: TokenPath | None = None
    # For wandb: entity/project/run_id; none takes the run that numbers go to.
    wandb_run_path: RunPath | None = None
    # Accepted, has no effect because it had none.
    save_all: bool = False
    # Accepted, has no effect because it had none.
    save_latest: bool = True
    # Accepted, has no effect because it had none.
    save_best: bool = True


@part
class Tracker:
    """The run's folder, and where else its numbers and weights go."""

    # Folder of the run.
    data_path: Text = "./.tracker-data"
    # Whether a finished or different run in that folder is replaced; an unfinished one goes on.
    overwrite_data_path: bool = False
    # Where numbers go: one logger, or a list.
    log: list[TrackerLog] = field(default_factory=lambda: [TrackerLog()])
    # A checkpoint to start from.
    load: TrackerLoad | None = None
    # Where checkpoints go: one, or a list.
    save: list[TrackerSave] = field(default_factory=list)


@part
class DecoderFile:
    """A decoder config; all but decoder and data may be left out."""

    # The cascade and its diffusion.
    decoder: Decoder
    # Shards of images and arrays of embeddings.
    data: Data
    # How long, and how.
    train: Train = field(default_factory=Train)
    # Metrics at the end of each epoch.
    evaluate: Evaluate = field(default_factory=Evaluate)
    # The run's folder, and where else its numbers and weights go.
    tracker: Tracker = field(default_factory=Tracker)
    # Everything random follows from it.
    seed: NonNegative = 0
