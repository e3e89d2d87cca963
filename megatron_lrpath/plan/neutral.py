"""Megatron arguments that do not change a result, and those that follow from a plan, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Neutral:
    """Arguments (names with underscores, as on the command line) and why a result does not depend on them."""

    reason: str
    names: frozenset[str]
    prefixes: tuple[str, ...] = ()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEUTRAL = (
    Neutral(
        "parallel layout: the same sums, distributed otherwise; checkpoints are resharded when loaded",
        _names("""
            tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
            hierarchical_context_parallel_sizes expert_model_parallel_size expert_tensor_parallel_size
            sequence_parallel num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
            microbatch_group_size_per_virtual_pipeline_stage decoder_first_pipeline_num_layers
            decoder_last_pipeline_num_layers pipeline_model_parallel_layout
            pipeline_model_parallel_comm_backend
            account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
            use_distributed_optimizer num_distributed_optimizer_instances data_parallel_sharding_strategy
            use_megatron_fsdp use_torch_fsdp2 torch_fsdp2_no_reshard_after_forward use_tp_pp_dp_mapping
            cp_comm_type micro_batch_size
        """),
    ),
    Neutral(
        "communication: when and through what the processes talk",
        _names("""
            distributed_backend distributed_timeout_minutes distributed_timeout_seconds_after_init
            overlap_grad_reduce overlap_param_gather overlap_param_gather_with_optimizer_step
            no_align_param_gather disable_align_grad_reduce no_overlap_p2p_communication
            overlap_p2p_communication_warmup_flush ddp_num_buckets ddp_bucket_size
            ddp_pad_buckets_for_high_nccl_busbw disable_gloo_process_groups use_nccl_ub
            nccl_communicator_config_path use_sharp sharp_enabled_group high_priority_stream_groups
            use_ring_exchange_p2p local_rank
        """),
        ("tp_comm_", "disable_tp_comm_", "flight_recorder_", "disable_flight_recorder_"),
    ),
    Neutral(
        "memory: activations, gradients or optimizer state are kept, moved or computed again",
        _names("""
            recompute_granularity recompute_method recompute_num_layers recompute_modules
            recompute_activations
            distribute_saved_activations cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers
            optimizer_cpu_offload optimizer_offload_fraction use_torch_optimizer_for_cpu_offload
            overlap_cpu_optimizer_d2h_h2d no_pin_cpu_grads no_pin_cpu_params empty_unused_memory_level
            defer_embedding_wgrad_compute wgrad_deferral_limit
        """),
    ),
    Neutral(
        "kernels: the same formula in another implementation",
        _names("""
            transformer_impl attention_backend flash_attention_version use_flash_attn no_masked_softmax_fusion
            no_bias_gelu_fusion no_bias_swiglu_fusion no_bias_dropout_fusion no_rope_fusion
            no_gradient_accumulation_fusion no_gradient_reduce_div_fusion no_persist_layer_norm
            cross_entropy_loss_fusion cross_entropy_fusion_impl disable_jit_fuser deterministic_mode
            use_cpu_initialization
        """),
        ("cuda_graph_",),
    ),
    Neutral(
        "logging: what is written about the run",
        _names("""
            log_interval log_params_norm log_throughput log_progress logging_level log_energy
            log_num_zeros_in_grad log_max_attention_logit log_memory_interval log_device_memory_used
            no_barrier_with_level_1_timing disable_log_loss_scale_to_tensorboard
            no_one_logger app_tag_run_name app_tag_run_version
        """),
        (
            "tensorboard_",
            "log_timers_",
            "log_validation_",
            "log_memory_",
            "log_world_",
            "timing_log_",
            "wandb_",
            "one_logger_",
        ),
    ),
    Neutral(
        "saving: when, how and how long checkpoints are kept",
        _names("""
            save_interval persistent_save_interval save_retain_interval async_save async_strategy
            use_persistent_ckpt_worker replication replication_jump replication_factor verify_integrity
            no_ckpt_fully_parallel_save dist_ckpt_workers dist_ckpt_strictness
            dist_ckpt_optim_fully_reshardable
            distrib_optim_fully_reshardable_mem_efficient exit_on_missing_checkpoint
        """),
        ("non_persistent_", "async_ckpt_", "ckpt_fully_parallel_", "ckpt_assume_", "disable_ckpt_load_"),
    ),
    Neutral(
        "evaluation: looks at the model and leaves it as it is",
        _names("""
            eval_iters eval_interval start_eval_at_iter eval_global_batch_size eval_micro_batch_size
            full_validation multiple_validation_sets validation_set_names
        """),
    ),
    Neutral(
        "profiling",
        _names("profile record_memory_history memory_snapshot_path record_shapes nvtx_ranges"),
        ("profile_", "use_pytorch_profiler", "pytorch_profiler_"),
    ),
    Neutral(
        "running: when a process ends, how it is watched, how it reads",
        _names("""
            exit_interval exit_duration_in_mins exit_signal exit_signal_handler
            exit_signal_handler_for_dataloader exit_signal_handler_for_training manual_gc manual_gc_interval
            disable_manual_gc_eval num_workers data_cache_path num_dataset_builder_threads
            dataloader_fast_cache_load dataloader_defer_npy_index_mmap no_mmap_bin_files
            no_create_attention_mask_in_dataloader object_storage_cache_path
            check_weight_hash_across_dp_replicas_interval train_sync_interval rerun_mode error_injection_rate
            error_injection_type adlr_autoresume adlr_autoresume_interval enable_ft_package calc_ft_timeouts
            log_straggler straggler_ctrlr_port straggler_minmax_count disable_straggler_on_startup
            run_workload_inspector_server trust_remote_code
        """),
        ("inprocess_",),
    ),
)

OWN_NEUTRAL = frozenset({"peak_tflops"})
"""Arguments of this project that only say how a run is shown."""

# Megatron arguments that follow from a plan, and the key of the plan that says what they are.
SET_BY_PLAN = {
    name: key
    for key, names in {
        "schedule.max_lr": "lr",
        "schedule.min_lr": "min_lr",
        "schedule.style": "lr_decay_style",
        "schedule.wsd_decay_shape": "lr_wsd_decay_style",
        "schedule.wsd_decay_fraction": "lr_wsd_decay_iters lr_wsd_decay_samples",
        "schedule.cycle_steps": "lr_decay_iters lr_decay_samples",
        "schedule.warmup_steps": "lr_warmup_iters lr_warmup_samples lr_warmup_fraction lr_warmup_init warmup",
        "schedule": "override_opt_param_scheduler use_checkpoint_opt_param_scheduler",
        "versions": "train_iters train_samples phase_transition_iterations",
        "batch.global_batch_size": "global_batch_size rampup_batch_size step_batch_size_schedule "
        "decrease_batch_size_if_needed",
        "batch.micro_batch_size": "micro_batch_size batch_size",
        "batch.seq_length": "seq_length encoder_seq_length decoder_seq_length",
        "seed": "seed",
        "tokenizer": "tokenizer_type tokenizer_model vocab_size",
        "data": "data_path split train_data_path valid_data_path test_data_path data_args_path "
        "per_split_data_args_path mock_data",
        "output": "save load ckpt_step finetune tensorboard_dir",
    }.items()
    for name in names.split()
}


def is_neutral(name: str) -> bool:
    """Whether an argument of Megatron's or ours (with underscores) leaves the result of a run alone."""
    return name in OWN_NEUTRAL or any(
        name in group.names or name.startswith(group.prefixes) for group in NEUTRAL
    )
