from diffusers.optimization import get_scheduler


def schedule_of(options, optimizer, steps):
    return get_scheduler(
        options.lr_scheduler, optimizer, num_warmup_steps=options.lr_warmup_steps, num_training_steps=steps
    )
